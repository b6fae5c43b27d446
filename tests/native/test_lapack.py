"""csrc/cpu/lapack.h: products where torch exports no BLAS, the guard of MKL's threads, the size of work space."""

import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found")


def test_threads_work_space_and_products_without_blas(tmp_path):
    program = tmp_path / "lapack_host"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    source = ROOT / "tests" / "native" / "lapack_host.cpp"
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Column-major: a matrix with stride 5 is the transpose of a row-major one.
    a = torch.arange(25.0, dtype=torch.float64).view(5, 5).T
    b = a - 7
    lines = done.stdout.strip().splitlines()
    for (ta, tb), line in zip(product("NT", repeat=2), lines, strict=True):
        left = a[:2, :4] if ta == "N" else a[:4, :2].T
        right = b[:4, :3] if tb == "N" else b[:3, :4].T
        want = torch.ones(3, 5, dtype=torch.float64)
        want[:, :2] = (2 * left @ right + 3).T
        numbers = torch.tensor([float(x) for x in line.split()], dtype=torch.float64)
        assert torch.equal(numbers[:15], want.flatten())
        assert torch.equal(numbers[15:], (left @ right).T.flatten())
