"""Kernels that test the harness itself: one plain, one that must spill."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x_ptr, out_ptr, n, scale, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, x * scale, mask=offsets < n)


@triton.jit
def square_kernel(a_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(a_ptr + at)
    # The tile lives on across the product: far more than 64 registers for each of 32 threads.
    tl.store(out_ptr + at, tl.dot(a, a) + a)


COMPILE_CASES = {
    "scale_bf16": (
        scale_kernel,
        {"x_ptr": "*bf16", "out_ptr": "*fp32", "n": "i32", "scale": "fp32"},
        {"BLOCK": 1024},
        4,
    ),
}
SPILLING_CASES: dict[str, Any] = {
    "square_64_registers": (
        square_kernel,
        {"a_ptr": "*fp32", "out_ptr": "*fp32"},
        {"BLOCK": 64},
        {"num_warps": 1, "maxnreg": 64},
    ),
}
