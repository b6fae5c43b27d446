"""Forward and backward, one chunk of rows at a time: the vendor's skinny products, and the passes over rows between.

    N tokens, D channels, S columns of A (down), R rows of B (up), P look-ahead products of earlier layers, M addends

A chunk stays in the cache of a CPU between its product with A, the pass over its rows and its product with B. Other
devices take all rows at once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill import gemm
from effkern.ops.laurel import low_rank, scalars
from effkern.ops.laurel.rows import BackwardRows, ForwardRows, Passes

# Bytes of one chunk of x on a CPU.
CHUNK_BYTES = 1 << 20


class Problem(NamedTuple):
    """The arguments of laurel_fwd, in its order, as laurel_bwd gets them again."""

    branch_ND: Tensor | None
    """None in a backward pass without it."""
    x_ND: Tensor
    weights: Tensor | None
    down_DS: Tensor | None
    up_RD: Tensor | None
    past_NP: Tensor | None
    low_rank_weight_D: Tensor | None
    addends: tuple[Tensor, ...]
    coefficients: Tensor | None
    norm_weight_D: Tensor | None
    scalar_map: str
    scale: float
    low_rank_eps: float
    norm_eps: float


class Result(NamedTuple):
    y_ND: Tensor
    normed_ND: Tensor | None
    own_NS: Tensor | None
    rstd_N: Tensor | None


class Grads(NamedTuple):
    branch_ND: Tensor
    x_ND: Tensor
    weights: Tensor | None
    down_DS: Tensor | None
    up_RD: Tensor | None
    past_NP: Tensor | None
    low_rank_weight_D: Tensor | None
    addends: tuple[Tensor, ...]
    coefficients: Tensor | None
    norm_weight_D: Tensor | None


class _Wide(NamedTuple):
    """Small operands in float32 (float64), and the matrices in the type of x."""

    alpha: Tensor
    beta: Tensor
    coefficients: Tensor | None
    norm_weight: Tensor | None
    down_DS: Tensor | None
    up_RD: Tensor | None
    low_rank_weight: Tensor | None
    gram_RR: Tensor | None
    scaled_up_RD: Tensor | None
    """beta B diag(low_rank_weight), in the type of x."""


def _widen(p: Problem) -> _Wide:
    dtype = p.x_ND.dtype
    acc = torch.promote_types(dtype, torch.float32)
    if p.weights is None:
        alpha = beta = torch.full((1,), p.scale, dtype=acc, device=p.x_ND.device)
    else:
        alpha, beta = (c.mul(p.scale).contiguous() for c in scalars.coefficients(p.weights.to(acc), p.scalar_map))
    coefficients = None if p.coefficients is None else scalars.rows_of(p.coefficients.to(acc)) * p.scale
    if p.addends and coefficients is None:
        coefficients = torch.full((len(p.addends), 1), p.scale, dtype=acc, device=p.x_ND.device)
    norm_weight = None if p.norm_weight_D is None else p.norm_weight_D.to(acc)
    down = None if p.down_DS is None else p.down_DS.to(dtype)
    up = inner = gram = scaled = None
    if p.up_RD is not None:
        up = scaled = p.up_RD.to(acc)
        if p.low_rank_weight_D is not None:
            inner = p.low_rank_weight_D.to(acc)
            gram = torch.mm(up, up.t())
            scaled = up * inner
        if p.weights is not None or p.scale != 1.0:
            scaled = scaled * beta
        scaled = scaled.to(dtype)
    return _Wide(alpha, beta, coefficients, norm_weight, down, up, inner, gram, scaled)


def _chunks(x_ND: Tensor) -> Iterator[slice]:
    num_rows, dim = x_ND.shape
    step = num_rows
    if x_ND.device.type == "cpu":
        step = max(32, CHUNK_BYTES // (dim * x_ND.element_size()))
    for first in range(0, num_rows, max(1, step)):
        yield slice(first, first + step)


def _cut(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def forward(p: Problem, passes: Passes) -> Result:
    assert p.branch_ND is not None
    x, w = p.x_ND, _widen(p)
    num_rows, dim = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = None if w.norm_weight is None else torch.empty_like(y)
    rstd = None if normed is None else x.new_empty(num_rows, dtype=w.alpha.dtype)
    own = None if w.down_DS is None else x.new_empty((num_rows, w.down_DS.shape[1]))
    for rows in _chunks(x):
        if own is not None and w.down_DS is not None:
            torch.mm(x[rows], w.down_DS, out=own[rows])
        low = None
        if w.scaled_up_RD is not None:
            raw = low_rank.join(_cut(own, rows), _cut(p.past_NP, rows), w.scaled_up_RD.shape[0])
            if w.gram_RR is not None:
                raw = (raw * low_rank.inverse_rms(raw, w.gram_RR, dim, p.low_rank_eps)).to(x.dtype)
            # The result takes its place.
            low = torch.mm(raw, w.scaled_up_RD, out=y[rows])
        passes.forward(
            ForwardRows(
                p.branch_ND[rows], x[rows], low, tuple(e[rows] for e in p.addends), w.alpha, w.beta, w.coefficients,
                w.norm_weight, p.norm_eps, y[rows], _cut(normed, rows), _cut(rstd, rows),
            )
        )  # fmt: skip
    return Result(y, normed, own, rstd)


def backward(
    p: Problem, r: Result, grad_y: Tensor | None, grad_normed: Tensor | None, grad_own: Tensor | None, passes: Passes
) -> Grads:
    """`r.y_ND` is read only with a norm or where alpha's gradient needs it; `grad_own` is that of all of own."""
    x, w = p.x_ND, _widen(p)
    num_rows, dim = x.shape
    acc = w.alpha.dtype
    unit = p.weights is None and p.scale == 1.0

    def zeros(*shape: int) -> Tensor:
        return x.new_zeros(shape, dtype=acc)

    grad_branch, grad_x = torch.empty_like(x), torch.empty_like(x)
    grad_addends = tuple(torch.empty_like(e) for e in p.addends)
    grad_norm_weight = None if w.norm_weight is None else zeros(dim)
    sums = None
    if p.weights is not None or p.coefficients is not None:
        per_channel = any(c is not None and c.dim() == 2 for c in (p.weights, p.coefficients))
        sums = x.new_zeros((2 + len(p.addends), dim if per_channel else 1), dtype=torch.float64)
    grad_down = None if w.down_DS is None else zeros(*w.down_DS.shape)
    grad_scaled = grad_gram = grad_past = None
    if w.up_RD is not None:
        grad_scaled = zeros(*w.up_RD.shape)
        grad_gram = None if w.gram_RR is None else zeros(*w.gram_RR.shape)
        grad_past = None if p.past_NP is None else torch.empty_like(p.past_NP)

    wide_buffer = None
    for rows in _chunks(x):
        count = x[rows].shape[0]
        if unit and acc == x.dtype:
            g = grad_branch[rows]
        else:
            if wide_buffer is None:
                wide_buffer = x.new_empty((count, dim), dtype=acc)
            g = wide_buffer[:count]
        if unit:
            rounded = grad_branch[rows]
        else:
            rounded = g if acc == x.dtype else x.new_empty((count, dim))
        passes.backward(
            BackwardRows(
                _cut(grad_y, rows), _cut(grad_normed, rows), x[rows], _cut(r.y_ND, rows), _cut(p.branch_ND, rows),
                _cut(r.rstd_N, rows), tuple(e[rows] for e in p.addends), w.alpha, w.coefficients, w.norm_weight, g,
                None if rounded is g else rounded, None if unit else grad_branch[rows],
                tuple(e[rows] for e in grad_addends), sums, grad_norm_weight,
            )
        )  # fmt: skip
        grad_raw = None
        if w.up_RD is not None:
            assert w.scaled_up_RD is not None
            assert grad_scaled is not None
            raw = low_rank.join(_cut(r.own_NS, rows), _cut(p.past_NP, rows), w.up_RD.shape[0])
            v = raw
            grad_raw = torch.mm(rounded, w.scaled_up_RD.t())
            if w.gram_RR is not None:
                assert grad_gram is not None
                v = (raw * low_rank.inverse_rms(raw, w.gram_RR, dim, p.low_rank_eps)).to(x.dtype)
                grad_raw = low_rank.scale_grad(grad_raw.to(acc), raw, w.gram_RR, dim, p.low_rank_eps, grad_gram)
            gemm.add_weight_grad(grad_scaled, v, rounded, False)
            if grad_past is not None:
                first = grad_raw.shape[1] - grad_past.shape[1]
                grad_past[rows] = grad_raw[:, first:]
                grad_raw = grad_raw[:, :first]
        low = None
        if grad_down is not None:
            assert w.down_DS is not None
            grad_u = _own_grad(grad_raw, _cut(grad_own, rows), w.down_DS.shape[1]).to(x.dtype)
            gemm.add_weight_grad(grad_down, x[rows], grad_u, False)
            low = torch.mm(grad_u, w.down_DS.t(), out=grad_x[rows])
        passes.grad_x(g, low, w.beta, grad_x[rows])

    grad_up, grad_inner, of_scaled = _up_grads(w, grad_scaled, grad_gram)
    grad_weights, grad_coefficients = _scalar_grads(p, w, sums, of_scaled)
    return Grads(
        grad_branch, grad_x, grad_weights, grad_down, grad_up, grad_past, grad_inner, grad_addends, grad_coefficients,
        grad_norm_weight,
    )  # fmt: skip


def _own_grad(grad_raw: Tensor | None, grad_own: Tensor | None, width: int) -> Tensor:
    """[C, S]: what reached this layer's own columns, plus what later layers sent to all of them."""
    if grad_own is None:
        assert grad_raw is not None
        return torch.nn.functional.pad(grad_raw, (0, width - grad_raw.shape[1]))
    if grad_raw is None:
        return grad_own
    total = grad_own.to(grad_raw.dtype, copy=True)
    total[:, : grad_raw.shape[1]] += grad_raw
    return total


def _up_grads(
    w: _Wide, grad_scaled: Tensor | None, grad_gram: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of B and of the inner norm's weight, from G = v^T g; and per channel the sum over rows of g (v B)."""
    if grad_scaled is None:
        return None, None, None
    assert w.up_RD is not None
    inner = w.up_RD if w.low_rank_weight is None else w.up_RD * w.low_rank_weight
    of_scaled = (inner * grad_scaled).sum(0)
    grad_inner = None
    grad_scaled = grad_scaled * w.beta
    if w.low_rank_weight is not None:
        assert grad_gram is not None
        grad_inner = (w.up_RD * grad_scaled).sum(0)
        grad_scaled = grad_scaled * w.low_rank_weight
        grad_scaled = torch.addmm(grad_scaled, grad_gram + grad_gram.t(), w.up_RD)
    return grad_scaled, grad_inner, of_scaled


def _scalar_grads(
    p: Problem, w: _Wide, sums: Tensor | None, of_scaled: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Of the raw scalars and of the addends' coefficients.

    With h = x + v B: sum(g y) = alpha sum(g f) + beta sum(g h) + sum_j c_j sum(g e_j), so that the branch itself is
    not needed where alpha is away from 0.
    """
    if sums is None:
        return None, None
    alpha, beta = w.alpha.double(), w.beta.double()
    of_kept, of_x, of_addends = sums[0], sums[1], sums[2:]
    if of_scaled is not None:
        of_x = of_x + (of_scaled.double() if sums.shape[1] > 1 else of_scaled.double().sum())
    grad_coefficients = grad_weights = None
    if p.coefficients is not None:
        one = of_addends.sum(1) if p.coefficients.dim() == 1 else of_addends
        grad_coefficients = (one * p.scale).to(w.alpha.dtype)
    if p.weights is not None:
        of_branch = of_kept
        if p.branch_ND is None:
            of_branch = of_kept - beta * of_x
            if p.addends:
                assert w.coefficients is not None
                of_branch = of_branch - (w.coefficients.double() * of_addends).sum(0)
            of_branch = of_branch / alpha
        if p.weights.dim() == 1:
            of_branch, of_x = of_branch.sum(0, keepdim=True), of_x.sum(0, keepdim=True)
        grad_weights = scalars.gradient(
            p.weights.to(w.alpha.dtype), p.scalar_map, of_branch * p.scale, of_x * p.scale
        )
    return grad_weights, grad_coefficients
