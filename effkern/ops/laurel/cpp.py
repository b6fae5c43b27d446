"""The passes by effkern._C: float32 and bfloat16, float32 inside."""

import torch
from torch import Tensor

from effkern import native

# Declares the bfloat16 products, which the passes call by name.
from effkern.ops.distill import gemm_schema as gemm_schema
from effkern.ops.laurel.passes import BackwardPass, ForwardPass, Passes

native.load("_C")


def forward(p: ForwardPass) -> None:
    torch.ops.effkern.laurel_forward_chunks_(*p)


def backward(p: BackwardPass) -> None:
    torch.ops.effkern.laurel_backward_chunks_(*p)


def scaled_up(up: Tensor, low_rank_weight: Tensor | None, beta: Tensor | None, dtype: torch.dtype) -> Tensor:
    if low_rank_weight is None and beta is None:
        return up.to(dtype)
    scaled = torch.empty(up.shape, dtype=dtype)
    torch.ops.effkern.laurel_scale_up_(scaled, _rows(up), low_rank_weight, beta)
    return scaled


def up_grads(up: Tensor, grad_scaled: Tensor, beta: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    grad_up = torch.empty(up.shape, dtype=up.dtype if _covered(up) else torch.float32)
    of_scaled = torch.empty(columns, dtype=torch.float64)
    torch.ops.effkern.laurel_up_grads_(_rows(up), grad_scaled, beta, grad_up, of_scaled)
    return grad_up, of_scaled


def _covered(up: Tensor) -> bool:
    return up.dtype in (torch.float32, torch.bfloat16)


def _rows(up: Tensor) -> Tensor:
    """B as the kernels read it."""
    return (up if _covered(up) else up.float()).contiguous()


PASSES = Passes(forward, backward, scaled_up, up_grads, rounds_grad_down=True)
