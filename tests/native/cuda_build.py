"""Builds effkern._C_cuda in build/cuda and reads what its kernels take.

python -m tests.native.cuda_build --write     after a kernel was changed on purpose: commit the table with the reason
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.native.resources import read_usage, write_table

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "cuda_resources.json"


def compiler() -> str | None:
    """Version of nvcc, or None."""
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    return f"nvcc {match[1]}" if match else None


def build() -> Path:
    """Path of the module; incremental, with the same CMakeLists.txt as the installation."""
    folder = ROOT / "build" / "cuda"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands: list[list[str | Path]] = [
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         f"-DEFFKERN_OUTPUT_DIR={folder / 'out'}", "-DEFFKERN_DATA=OFF"],
        ["cmake", "--build", folder, "--target", "_C_cuda"],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out" / "_C_cuda.abi3.so"


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    write_table(TABLE, str(compiler()), read_usage(build()))
