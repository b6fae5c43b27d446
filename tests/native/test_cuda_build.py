"""_C_cuda compiles and links for every architecture, spills nothing, and asks only torch and the system for symbols."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effkern.native import CUDA_ARCHITECTURES
from tests.native import cuda_build, resources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cuda_build.compiler() is None, reason="nvcc not found"),
]

# Symbols of libtorch_cuda.so, which the CPU wheel does not have.
TORCH_CUDA = {"aoti_torch_get_current_cuda_stream"}


@pytest.fixture(scope="module")
def module() -> Path:
    return cuda_build.build()


@pytest.fixture(scope="module")
def usage(module) -> resources.Usage:
    if resources.cuobjdump() is None:
        pytest.skip("cuobjdump not found")
    return resources.read_usage(module)


def test_every_architecture_holds_every_kernel(usage):
    assert set(usage) == set(CUDA_ARCHITECTURES)
    first, *others = (set(kernels) for kernels in usage.values())
    assert first
    assert all(kernels == first for kernels in others)


def test_resources_are_as_committed(usage):
    found = resources.differences(cuda_build.TABLE, str(cuda_build.compiler()), usage)
    assert not found, "\n".join([*found, "meant? python -m tests.native.cuda_build --write"])


def test_the_table_can_fail(usage, tmp_path):
    """One register more, a spill, and a kernel that is gone are each reported."""
    changed = {architecture: {k: dict(row) for k, row in kernels.items()} for architecture, kernels in usage.items()}
    kernels = changed["sm_90a"]
    first, second, third = sorted(kernels)[:3]
    kernels[first]["registers"] += 1
    kernels[second]["stack"] = 8
    del kernels[third]
    resources.write_table(tmp_path / "table.json", "nvcc", usage)
    found = resources.differences(tmp_path / "table.json", "nvcc", changed)
    assert len(found) == 4
    assert "8 bytes of stack" in found[0]
    assert len(resources.differences(tmp_path / "table.json", "another nvcc", changed)) == 1


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm not found")
def test_undefined_symbols(module):
    def names(*arguments: str) -> list[str]:
        done = subprocess.run(["nm", "-D", *arguments], check=True, capture_output=True, text=True)
        return [line.split()[-1] for line in done.stdout.splitlines()]

    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    provided = {name.split("@")[0] for name in names("--defined-only", str(torch_cpu))} | TORCH_CUDA
    # Weak start-up hooks of the C runtime may stay undefined.
    system = re.compile(r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ITM_\w+|__gmon_start__|PyModule_Create2")
    strange = [n for n in names("--undefined-only", str(module)) if n not in provided and not system.fullmatch(n)]
    assert strange == []


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf not found")
def test_names_the_libraries_of_torch(module):
    """Those that Python has loaded are not searched unless a module names them: without this no torch would load it."""
    said = subprocess.run(["readelf", "-d", str(module)], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", said))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= needed
    assert "RPATH" not in said
    assert "RUNPATH" not in said


def test_registers_its_operators(module):
    """Loading it fills the CUDA entries of the dispatcher. Lazy binding: the CPU wheel lacks one symbol of libtorch."""
    # With such a wheel the build has made the library of that name.
    environment = {**os.environ, "LD_LIBRARY_PATH": str(module.parents[1])}
    script = f"""
import ctypes, os, torch, effkern.ops.token_stats
assert not torch._C._dispatch_has_kernel_for_dispatch_key("effkern::label_rank", "CUDA")
ctypes.CDLL({str(module)!r}, mode=os.RTLD_LAZY)
assert torch._C._dispatch_has_kernel_for_dispatch_key("effkern::label_rank", "CUDA")
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=cuda_build.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
