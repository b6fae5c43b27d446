"""Forward and backward around the passes over rows: small operands before them, gradients of scalars after them.

    N tokens, D channels, S columns of A (down), R rows of B (up), P look-ahead products of earlier layers, M addends

Whatever touches N x D is in the passes of an implementation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill import huge_pages
from effkern.ops.laurel import numbers, scalars
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


def _widen(p: Problem) -> _Wide:
    dtype = p.x_ND.dtype
    acc = torch.promote_types(dtype, torch.float32)
    if p.weights is None:
        alpha = beta = torch.full((1,), p.scale, dtype=acc, device=p.x_ND.device)
    elif _few_numbers(p.weights):
        pair = numbers.coefficients(p.weights.tolist(), p.scalar_map)
        alpha, beta = (torch.tensor([c * p.scale], dtype=acc) for c in pair)
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


def _few_numbers(t: Tensor) -> bool:
    """One number per scalar, to be read without waiting."""
    return t.dim() == 1 and t.device.type == "cpu"


def _scaled_up(w: _Wide, beta: Tensor | None, dtype: torch.dtype, passes: Passes) -> Tensor | None:
    return None if w.up_RD is None else passes.scaled_up(w.up_RD, w.low_rank_weight, beta, dtype)


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
            p.branch_ND, x, w.down_DS, _scaled_up(w, None, x.dtype, passes), p.past_NP, w.gram_RR, p.low_rank_eps,
            p.addends, w.alpha, w.beta, w.coefficients, w.norm_weight, p.norm_eps, y, own, normed, rstd,
        )
    )  # fmt: skip
    return Result(y, normed, own, rstd)


def backward(
    p: Problem, r: Result, grad_y: Tensor | None, grad_normed: Tensor | None, grad_own: Tensor | None, passes: Passes
) -> Grads:
    """`r.y_ND` is read only with a norm or where alpha's gradient needs it; `grad_own` is that of all of own."""
    x, w = p.x_ND, _widen(p)
    acc = w.alpha.dtype

    def empty_like(t: Tensor | None, dtype: torch.dtype = acc) -> Tensor | None:
        return None if t is None else torch.empty(t.shape, dtype=dtype, device=x.device)

    # Not in huge pages, in which both passes were slower in float32: a virtual machine took long to hand them out.
    grad_branch, grad_x = torch.empty_like(x), torch.empty_like(x)
    grad_addends = tuple(torch.empty_like(e) for e in p.addends)
    grad_norm_weight, grad_scaled, grad_gram = empty_like(w.norm_weight), empty_like(w.up_RD), empty_like(w.gram_RR)
    grad_down = empty_like(w.down_DS, x.dtype if passes.rounds_grad_down else acc)
    grad_past = None if p.past_NP is None else torch.empty_like(p.past_NP)
    sums = None
    if p.weights is not None or p.coefficients is not None:
        per_channel = any(c is not None and c.dim() == 2 for c in (p.weights, p.coefficients))
        columns = x.shape[1] if per_channel else 1
        sums = torch.empty((2 + len(p.addends), columns), dtype=torch.float64, device=x.device)
    beta = w.beta if p.weights is not None or p.scale != 1.0 else None
    passes.backward(
        BackwardPass(
            grad_y, grad_normed, grad_own, x, r.y_ND, p.branch_ND, r.own_NS, r.rstd_N, w.down_DS,
            _scaled_up(w, beta, x.dtype, passes), p.past_NP, w.gram_RR, p.low_rank_eps, p.addends, w.alpha, w.beta,
            w.coefficients, w.norm_weight, grad_branch, grad_x, grad_addends, sums,
            grad_norm_weight, grad_down, grad_scaled, grad_gram, grad_past,
        )
    )  # fmt: skip
    grad_inner = None
    if grad_scaled is None or w.low_rank_weight is not None:
        grad_up, grad_inner, of_scaled = _up_grads(w, grad_scaled, grad_gram)
    else:
        assert p.up_RD is not None
        grad_up, of_scaled = passes.up_grads(p.up_RD, grad_scaled, w.beta, 1 if sums is None else sums.shape[1])
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
    if sums.shape[1] == 1 and sums.device.type == "cpu":
        return _few_scalar_grads(p, w, sums, of_scaled)
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


def _few_scalar_grads(
    p: Problem, w: _Wide, sums: Tensor, of_scaled: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The same on plain numbers."""
    of_kept, of_x, *of_addends = sums[:, 0].tolist()
    alpha, beta = w.alpha.item(), w.beta.item()
    if of_scaled is not None:
        of_x += of_scaled.sum(dtype=torch.float64).item()
    grad_coefficients = grad_weights = None
    if p.coefficients is not None:
        grad_coefficients = torch.tensor([p.scale * one for one in of_addends], dtype=w.alpha.dtype)
        grad_coefficients = grad_coefficients.view(p.coefficients.shape)
    if p.weights is not None:
        of_branch = of_kept
        if p.branch_ND is None:
            of_branch -= beta * of_x
            if p.addends:
                assert w.coefficients is not None
                of_branch -= sum(c * one for c, one in zip(w.coefficients[:, 0].tolist(), of_addends))
            of_branch = 0.0 if alpha == 0.0 else of_branch / alpha
        raw = p.weights.reshape(-1).tolist()
        pair = numbers.gradient(raw, p.scalar_map, p.scale * of_branch, p.scale * of_x)
        grad_weights = torch.tensor(pair, dtype=w.alpha.dtype).view(p.weights.shape)
    return grad_weights, grad_coefficients
