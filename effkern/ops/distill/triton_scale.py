"""The backward of the loss in Triton: grad *= factor, with nothing read or written but the factor where it is 1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 2048, 8
# Programs take turns, so that a factor of 1 costs few of them.
MAX_PROGRAMS = 2048


@triton.jit
def scale_grad_kernel(grad_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            at = start + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + at, mask=at < size, other=0.0).to(tl.float32)
            tl.store(grad_ptr + at, (grad * factor).to(grad_ptr.dtype.element_ty), mask=at < size)


def scale_grad(grad: Tensor, factor: Tensor) -> None:
    """`grad` is contiguous, float32 or narrower; `factor` is a float32 tensor of one element on its device."""
    assert grad.is_contiguous()
    assert grad.dtype != torch.float64
    programs = min(triton.cdiv(grad.numel(), BLOCK), MAX_PROGRAMS)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(grad):
        scale_grad_kernel[(programs,)](grad, factor, grad.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)
