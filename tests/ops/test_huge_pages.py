"""Fresh memory: the advice reaches the system, and the tensor is what torch.empty gives."""

import sys
from pathlib import Path

import pytest
import torch

from effkern import native
from effkern.ops.distill import huge_pages

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags(address: int) -> set[str]:
    """Of the mapping that holds `address`, as the kernel reports them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and ":" not in first:
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError("no such mapping")


def test_cpp_large_memory_is_advised():
    if native.load("_C") or sys.platform != "linux" or not MODE.exists():
        pytest.skip("needs effkern._C and a Linux with transparent huge pages")
    x = huge_pages.empty((3, 5 << 20), torch.float32, torch.device("cpu"))
    assert "hg" in flags(x.data_ptr() + x.nbytes // 2)
    assert x.fill_(2).sum(dtype=torch.float64) == 2 * x.numel()


@pytest.mark.parametrize("shape", [(0, 4), (3, 7), (3 << 20,)], ids=str)
def test_cpp_is_an_empty_tensor(shape):
    x, plain = huge_pages.empty(shape, torch.bfloat16, torch.device("cpu")), torch.empty(shape, dtype=torch.bfloat16)
    assert (x.shape, x.dtype, x.stride(), x.device) == (plain.shape, plain.dtype, plain.stride(), plain.device)
    if native.load("_C") is None:
        before = x.clone()
        torch.ops.effkern.advise_huge_pages(x)
        torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
