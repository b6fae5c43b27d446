"""The passes over rows in plain PyTorch; float64 stays float64, everything else is computed in float32."""

import torch
from torch import Tensor

from effkern.ops.laurel.rows import BackwardRows, ForwardRows


def forward(r: ForwardRows) -> None:
    wide = r.alpha.dtype
    x = r.x_CD.to(wide)
    if r.low_rank_CD is not None:
        x = x + r.low_rank_CD.to(wide)
    y = r.alpha * r.branch_CD.to(wide) + r.beta * x
    for j, e in enumerate(r.addends):
        assert r.coefficients is not None
        y = y + r.coefficients[j] * e.to(wide)
    r.y_CD.copy_(y)
    if r.norm_weight is not None:
        assert r.normed_CD is not None
        assert r.rstd_C is not None
        # Of the rounded y, which is what backward sees.
        y = r.y_CD.to(wide)
        rstd = (y.square().mean(1) + r.norm_eps).rsqrt()
        r.rstd_C.copy_(rstd)
        r.normed_CD.copy_(y * rstd[:, None] * r.norm_weight)


def backward(r: BackwardRows) -> None:
    wide = r.alpha.dtype
    g = torch.zeros_like(r.x_CD, dtype=wide) if r.grad_y_CD is None else r.grad_y_CD.to(wide)
    if r.grad_normed_CD is not None:
        assert r.y_CD is not None
        assert r.rstd_C is not None
        assert r.norm_weight is not None
        assert r.grad_norm_weight_D is not None
        rstd = r.rstd_C[:, None]
        yh = r.y_CD.to(wide) * rstd
        grad_normed = r.grad_normed_CD.to(wide)
        h = grad_normed * r.norm_weight
        g = g + rstd * (h - yh * (h * yh).mean(1, keepdim=True))
        r.grad_norm_weight_D.add_((grad_normed * yh).sum(0))
    r.g_CD.copy_(g)
    if r.rounded_CD is not None:
        r.rounded_CD.copy_(g)
    if r.grad_branch_CD is not None:
        r.grad_branch_CD.copy_(r.alpha * g)
    for j, out in enumerate(r.grad_addends):
        assert r.coefficients is not None
        out.copy_(r.coefficients[j] * g)
    if r.sums is not None:
        kept = r.y_CD if r.branch_CD is None else r.branch_CD
        for j, other in enumerate((kept, r.x_CD, *r.addends)):
            if other is None:
                continue
            columns = (g * other.to(wide)).sum(0, dtype=torch.float64)
            r.sums[j] += columns if r.sums.shape[1] > 1 else columns.sum()


def grad_x(g_CD: Tensor, low_rank_CD: Tensor | None, beta: Tensor, out_CD: Tensor) -> None:
    total = beta * g_CD.to(beta.dtype)
    out_CD.copy_(total if low_rank_CD is None else total + low_rank_CD.to(beta.dtype))
