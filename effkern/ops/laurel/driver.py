"""Forward and backward around the passes over rows: small operands before them, gradients of scalars after them.

    N tokens, D channels, S columns of A (down), R rows of B (up), P look-ahead products of earlier layers, M addends

Whatever touches N x D is in the passes of an implementation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill import huge_pages
from effkern.ops.laurel import scalars
from effkern.ops.laurel.passes import BackwardPass, ForwardPass, Passes


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
    """As it was given."""
    low_rank_weight: Tensor | None
    gram_RR: Tensor | None

    def wide_up(self) -> Tensor:
        """B in float32 (float64)."""
        assert self.up_RD is not None
        return self.up_RD.to(self.alpha.dtype)

    def scaled_up(self, beta: bool, dtype: torch.dtype) -> Tensor | None:
        """(beta) B diag(low_rank_weight)."""
        if self.up_RD is None:
            return None
        if self.low_rank_weight is None and not beta:
            return self.up_RD.to(dtype)
        scaled = self.wide_up() if self.low_rank_weight is None else self.wide_up() * self.low_rank_weight
        return (scaled * self.beta if beta else scaled).to(dtype)


def _widen(p: Problem) -> _Wide:
    dtype = p.x_ND.dtype
    acc = torch.promote_types(dtype, torch.float32)
    if p.weights is None:
        alpha = beta = torch.full((1,), p.scale, dtype=acc, device=p.x_ND.device)
    else:
        alpha, beta = scalars.coefficients(p.weights.to(acc), p.scalar_map)
        if p.scale != 1.0:
            alpha, beta = alpha * p.scale, beta * p.scale
    coefficients = None if p.coefficients is None else scalars.rows_of(p.coefficients.to(acc)) * p.scale
    if p.addends and coefficients is None:
        coefficients = torch.full((len(p.addends), 1), p.scale, dtype=acc, device=p.x_ND.device)
    inner = gram = None
    if p.up_RD is not None and p.low_rank_weight_D is not None:
        inner, wide_up = p.low_rank_weight_D.to(acc), p.up_RD.to(acc)
        gram = torch.mm(wide_up, wide_up.t())
    return _Wide(
        alpha, beta, coefficients, None if p.norm_weight_D is None else p.norm_weight_D.to(acc),
        None if p.down_DS is None else p.down_DS.to(dtype), p.up_RD, inner, gram,
    )  # fmt: skip


def forward(p: Problem, passes: Passes) -> Result:
    assert p.branch_ND is not None
    x, w = p.x_ND, _widen(p)
    # Fresh memory costs a page fault for each 4 KiB.
    y = huge_pages.empty(x.shape, x.dtype, x.device)
    own = None if w.down_DS is None else x.new_empty((x.shape[0], w.down_DS.shape[1]))
    normed = rstd = None
    if w.norm_weight is not None:
        normed, rstd = huge_pages.empty(x.shape, x.dtype, x.device), x.new_empty(x.shape[0], dtype=w.alpha.dtype)
    passes.forward(
        ForwardPass(
            p.branch_ND, x, w.down_DS, w.scaled_up(False, x.dtype), p.past_NP, w.gram_RR, p.low_rank_eps, p.addends,
            w.alpha, w.beta, w.coefficients, w.norm_weight, p.norm_eps, y, own, normed, rstd,
        )
    )  # fmt: skip
    return Result(y, normed, own, rstd)


def backward(
    p: Problem, r: Result, grad_y: Tensor | None, grad_normed: Tensor | None, grad_own: Tensor | None, passes: Passes
) -> Grads:
    """`r.y_ND` is read only with a norm or where alpha's gradient needs it; `grad_own` is that of all of own."""
    x, w = p.x_ND, _widen(p)
    acc = w.alpha.dtype

    def zeros_like(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.zeros(t.shape, dtype=acc, device=x.device)

    # Not in huge pages, in which both passes were slower in float32: a virtual machine took long to hand them out.
    grad_branch, grad_x = torch.empty_like(x), torch.empty_like(x)
    grad_addends = tuple(torch.empty_like(e) for e in p.addends)
    grad_norm_weight, grad_down = zeros_like(w.norm_weight), zeros_like(w.down_DS)
    grad_scaled, grad_gram = zeros_like(w.up_RD), zeros_like(w.gram_RR)
    grad_past = None if p.past_NP is None else torch.empty_like(p.past_NP)
    sums = None
    if p.weights is not None or p.coefficients is not None:
        per_channel = any(c is not None and c.dim() == 2 for c in (p.weights, p.coefficients))
        columns = x.shape[1] if per_channel else 1
        sums = torch.zeros((2 + len(p.addends), columns), dtype=torch.float64, device=x.device)
    passes.backward(
        BackwardPass(
            grad_y, grad_normed, grad_own, x, r.y_ND, p.branch_ND, r.own_NS, r.rstd_N, w.down_DS,
            w.scaled_up(p.weights is not None or p.scale != 1.0, x.dtype), p.past_NP, w.gram_RR, p.low_rank_eps,
            p.addends, w.alpha, w.beta, w.coefficients, w.norm_weight, grad_branch, grad_x, grad_addends, sums,
            grad_norm_weight, grad_down, grad_scaled, grad_gram, grad_past,
        )
    )  # fmt: skip
    grad_up, grad_inner, of_scaled = _up_grads(w, grad_scaled, grad_gram)
    grad_weights, grad_coefficients = _scalar_grads(p, w, sums, of_scaled)
    return Grads(
        grad_branch, grad_x, grad_weights, grad_down, grad_up, grad_past, grad_inner, grad_addends, grad_coefficients,
        grad_norm_weight,
    )  # fmt: skip


def _up_grads(
    w: _Wide, grad_scaled: Tensor | None, grad_gram: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of B and of the inner norm's weight, from G = v^T g; and per channel the sum over rows of g (v B)."""
    if grad_scaled is None:
        return None, None, None
    up = w.wide_up()
    inner = up if w.low_rank_weight is None else up * w.low_rank_weight
    of_scaled = (inner * grad_scaled).sum(0)
    grad_inner = None
    grad_scaled = grad_scaled * w.beta
    if w.low_rank_weight is not None:
        assert grad_gram is not None
        grad_inner = (up * grad_scaled).sum(0)
        grad_scaled = grad_scaled * w.low_rank_weight
        grad_scaled = torch.addmm(grad_scaled, grad_gram + grad_gram.t(), up)
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
            # Where alpha is 0, so is the slope of its map: no scalar gets anything through it.
            of_branch = torch.where(alpha == 0, 0.0, of_branch / alpha)
        if p.weights.dim() == 1 and sums.shape[1] > 1:
            of_branch, of_x = of_branch.sum(0, keepdim=True), of_x.sum(0, keepdim=True)
        if p.scale != 1.0:
            of_branch, of_x = of_branch * p.scale, of_x * p.scale
        grad_weights = scalars.gradient(p.weights.to(w.alpha.dtype), p.scalar_map, of_branch, of_x)
    return grad_weights, grad_coefficients
