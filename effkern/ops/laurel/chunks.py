"""The passes in plain PyTorch, one chunk of rows at a time, so that few rows are wide at once.

Other devices than a CPU take all rows at once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from effkern.ops.distill import gemm
from effkern.ops.laurel import low_rank, reference
from effkern.ops.laurel.passes import BackwardPass, ForwardPass, Passes
from effkern.ops.laurel.rows import BackwardRows, ForwardRows

# Bytes of one chunk of x on a CPU.
CHUNK_BYTES = 1 << 20


def _chunks(x_ND: Tensor) -> Iterator[slice]:
    num_rows, dim = x_ND.shape
    step = num_rows
    if x_ND.device.type == "cpu":
        step = max(32, CHUNK_BYTES // (dim * x_ND.element_size()))
    for first in range(0, num_rows, max(1, step)):
        yield slice(first, first + step)


def _cut(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def forward(p: ForwardPass) -> None:
    x, y, dim = p.x_ND, p.y_ND, p.x_ND.shape[1]
    for rows in _chunks(x):
        if p.own_NS is not None and p.down_DS is not None:
            torch.mm(x[rows], p.down_DS, out=p.own_NS[rows])
        low = None
        if p.up_RD is not None:
            raw = low_rank.join(_cut(p.own_NS, rows), _cut(p.past_NP, rows), p.up_RD.shape[0])
            if p.gram_RR is not None:
                raw = (raw * low_rank.inverse_rms(raw, p.gram_RR, dim, p.low_rank_eps)).to(x.dtype)
            # The result takes its place.
            low = torch.mm(raw, p.up_RD, out=y[rows])
        reference.forward(
            ForwardRows(
                p.branch_ND[rows], x[rows], low, tuple(e[rows] for e in p.addends), p.alpha, p.beta, p.coefficients,
                p.norm_weight, p.norm_eps, y[rows], _cut(p.normed_ND, rows), _cut(p.rstd_N, rows),
            )
        )  # fmt: skip


def backward(p: BackwardPass) -> None:
    for total in (p.sums, p.grad_norm_weight, p.grad_down_DS, p.grad_up_RD, p.grad_gram_RR):
        if total is not None:
            total.zero_()
    x, dim, acc = p.x_ND, p.x_ND.shape[1], p.alpha.dtype
    for rows in _chunks(x):
        g = x.new_empty(x[rows].shape, dtype=acc)
        rounded = g if acc == x.dtype else x.new_empty(x[rows].shape)
        reference.backward(
            BackwardRows(
                _cut(p.grad_y_ND, rows), _cut(p.grad_normed_ND, rows), x[rows], _cut(p.y_ND, rows),
                _cut(p.branch_ND, rows), _cut(p.rstd_N, rows), tuple(e[rows] for e in p.addends), p.alpha,
                p.coefficients, p.norm_weight, g, None if rounded is g else rounded, p.grad_branch_ND[rows],
                tuple(e[rows] for e in p.grad_addends), p.sums, p.grad_norm_weight,
            )
        )  # fmt: skip
        grad_raw = None
        if p.up_RD is not None:
            assert p.grad_up_RD is not None
            raw = low_rank.join(_cut(p.own_NS, rows), _cut(p.past_NP, rows), p.up_RD.shape[0])
            v = raw
            grad_raw = torch.mm(rounded, p.up_RD.t())
            if p.gram_RR is not None:
                assert p.grad_gram_RR is not None
                v = (raw * low_rank.inverse_rms(raw, p.gram_RR, dim, p.low_rank_eps)).to(x.dtype)
                grad_raw = low_rank.scale_grad(
                    grad_raw.to(acc), raw, p.gram_RR, dim, p.low_rank_eps, p.grad_gram_RR
                )  # fmt: skip
            gemm.add_weight_grad(p.grad_up_RD, v, rounded, False)
            if p.grad_past_NP is not None:
                first = grad_raw.shape[1] - p.grad_past_NP.shape[1]
                p.grad_past_NP[rows] = grad_raw[:, first:]
                grad_raw = grad_raw[:, :first]
        low = None
        if p.grad_down_DS is not None and p.down_DS is not None:
            grad_u = own_grad(grad_raw, _cut(p.grad_own_NS, rows), p.down_DS.shape[1])
            if grad_u is not None:
                grad_u = grad_u.to(x.dtype)
                gemm.add_weight_grad(p.grad_down_DS, x[rows], grad_u, False)
                low = torch.mm(grad_u, p.down_DS.t(), out=p.grad_x_ND[rows])
        reference.grad_x(g, low, p.beta, p.grad_x_ND[rows])


def own_grad(grad_raw: Tensor | None, grad_own: Tensor | None, width: int) -> Tensor | None:
    """[C, S]: what reached this layer's own columns, plus what later layers sent to all of them."""
    if grad_own is None:
        return None if grad_raw is None else torch.nn.functional.pad(grad_raw, (0, width - grad_raw.shape[1]))
    if grad_raw is None:
        return grad_own
    total = grad_own.to(grad_raw.dtype, copy=True)
    total[:, : grad_raw.shape[1]] += grad_raw
    return total


def scaled_up(up: Tensor, low_rank_weight: Tensor | None, beta: Tensor | None, dtype: torch.dtype) -> Tensor:
    if low_rank_weight is None and beta is None:
        return up.to(dtype)
    scaled = up.to(torch.promote_types(dtype, torch.float32))
    for factor in (low_rank_weight, beta):
        scaled = scaled if factor is None else scaled * factor
    return scaled.to(dtype)


def up_grads(up: Tensor, grad_scaled: Tensor, beta: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    products = (up.to(grad_scaled.dtype) * grad_scaled).sum(0).double()
    return grad_scaled * beta, products if columns > 1 else products.sum(0, keepdim=True)


PASSES = Passes(forward, backward, scaled_up, up_grads, rounds_grad_down=False)
