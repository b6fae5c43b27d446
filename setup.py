"""Bridge from setuptools to CMakeLists.txt, which describes all compiled code. docs/install.md has the wheels.

EFFKERN_PURE=1 compiles nothing: a wheel for every platform. EFFKERN_ABI3=1 leaves out `_data`, the one module that is
of a single version of Python: a wheel for all of them from 3.10 on.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PURE = os.environ.get("EFFKERN_PURE") == "1"
ABI3 = os.environ.get("EFFKERN_ABI3") == "1"


class CMakeBuild(build_ext):
    def run(self) -> None:
        root = Path(__file__).parent.resolve()
        out = root / "effkern" if self.inplace else Path(self.build_lib).resolve() / "effkern"
        build = root / "build" / "cmake"
        if not self.inplace:
            # What an earlier build with other options left there would go into the wheel.
            for module in out.glob("*.so"):
                module.unlink()
        subprocess.check_call(
            [
                "cmake",
                "-S",
                root,
                "-B",
                build,
                "-G",
                "Ninja",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DEFFKERN_OUTPUT_DIR={out}",
                f"-DEFFKERN_DATA={'OFF' if ABI3 else 'ON'}",
                *os.environ.get("EFFKERN_CMAKE_ARGS", "").split(),
            ]
        )
        subprocess.check_call(["cmake", "--build", build])


setup(
    ext_modules=[] if PURE else [Extension("effkern._C", sources=[], py_limited_api=ABI3)],
    cmdclass={} if PURE else {"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 and not PURE else {},
)
