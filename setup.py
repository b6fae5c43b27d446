"""Bridge from setuptools to CMakeLists.txt, which describes all compiled code."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PURE = os.environ.get("EFFKERN_PURE") == "1"


class CMakeBuild(build_ext):
    def run(self) -> None:
        root = Path(__file__).parent.resolve()
        out = root / "effkern" if self.inplace else Path(self.build_lib).resolve() / "effkern"
        build = root / "build" / "cmake"
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
                *os.environ.get("EFFKERN_CMAKE_ARGS", "").split(),
            ]
        )
        subprocess.check_call(["cmake", "--build", build])


setup(
    ext_modules=[] if PURE else [Extension("effkern._C", sources=[])],
    # A pure wheel made in a built tree must not carry its modules.
    exclude_package_data={"effkern": ["*.so"]} if PURE else {},
    cmdclass={} if PURE else {"build_ext": CMakeBuild},
)
