"""The passes over rows by effkern._C: float32 and bfloat16, float32 inside."""

import torch
from torch import Tensor

from effkern import native
from effkern.ops.laurel.rows import BackwardRows, ForwardRows, Passes

native.load("_C")


def forward(r: ForwardRows) -> None:
    torch.ops.effkern.laurel_forward_rows_(*r[:3], list(r.addends), *r[4:])


def backward(r: BackwardRows) -> None:
    torch.ops.effkern.laurel_backward_rows_(
        r.grad_y_CD, r.grad_normed_CD, r.x_CD, r.y_CD, r.branch_CD, r.rstd_C, list(r.addends), r.alpha, r.coefficients,
        r.norm_weight, r.g_CD, r.rounded_CD, r.grad_branch_CD, list(r.grad_addends), r.sums, r.grad_norm_weight_D,
    )  # fmt: skip


def grad_x(g_CD: Tensor, low_rank_CD: Tensor | None, beta: Tensor, out_CD: Tensor) -> None:
    torch.ops.effkern.laurel_grad_x_(g_CD, low_rank_CD, beta, out_CD)


PASSES = Passes(forward, backward, grad_x)
