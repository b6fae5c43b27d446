"""The divergences of a sparse teacher in plain PyTorch: value, and gradient by hand.

    q = softmax(z / T), kept entries k = 1 .. K with target mass t, S = sum t, Q = sum of q over them, y label

Every gradient with respect to z / T has the form c q + b + (delta_k at the kept entries) + (e at the label): one
factor and one constant for the whole row, and K + 1 corrections. So nothing V-wide is made of the teacher.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill.rows import TAIL_FLOOR, RowOptions


class Kept(NamedTuple):
    """A sparse target against the student, [R, K]; `tail` and `outside` [R] are what is left of t and of q.

    Empty slots have t = q = 0.
    """

    ids: Tensor
    filled: Tensor
    t: Tensor
    log_t: Tensor
    log_q: Tensor
    q: Tensor
    is_label: Tensor
    tail: Tensor
    outside: Tensor


def gather(log_q: Tensor, ids: Tensor, logprobs: Tensor, y: Tensor, options: RowOptions) -> Kept:
    """The kept entries; y is [R, 1]. Renormalized kinds are normalised (at T') here."""
    filled = (ids >= 0) & (ids < log_q.shape[1])
    ids = torch.where(filled, ids, 0).long()
    log_t = torch.where(filled, logprobs.to(log_q.dtype), -torch.inf)
    if options.teacher in ("renormalized", "both_renormalized"):
        log_t = log_t / options.teacher_temperature
        total = log_t.logsumexp(-1, keepdim=True)
        log_t = torch.where(total == -torch.inf, -torch.inf, log_t - total)
    t = log_t.exp()
    kept_log_q = torch.where(filled, log_q.gather(1, ids), -torch.inf)
    tail = (1 - t.sum(-1)).clamp_min(0)
    outside = torch.zeros_like(tail)
    if options.teacher == "tail_bucket":
        # Not one minus the kept sum, which cancels where the student is sure.
        outside = ((1 - times_kept(ids, filled, log_q.shape[1])) * log_q.exp()).sum(-1)
    return Kept(ids, filled, t, log_t, kept_log_q, kept_log_q.exp(), filled & (ids == y), tail, outside)


def times_kept(ids: Tensor, filled: Tensor, vocab: int) -> Tensor:
    """In how many slots an entry of the vocabulary stands, [R, V]."""
    count = torch.zeros(ids.shape[0], vocab, dtype=torch.int32, device=ids.device)
    return count.scatter_add_(1, ids, filled.to(torch.int32))


def _dot(mass: Tensor, log_ratio: Tensor) -> Tensor:
    """sum mass log_ratio, with 0 log 0 = 0; a mass of nan is seen."""
    return torch.where(mass == 0, 0.0, mass * torch.where(mass == 0, 0.0, log_ratio)).sum(-1)


def _xlogx(mass: Tensor) -> Tensor:
    return torch.xlogy(mass, mass)


def value(x: Kept, log_q: Tensor, y: Tensor, options: RowOptions) -> Tensor:
    """D of each row, [R], differentiable through `log_q` and the gathered entries."""
    kind = options.teacher
    if kind == "tail_bucket":
        tail = x.tail.clamp_min(TAIL_FLOOR)
        tail_q = x.outside.clamp_min(TAIL_FLOOR)
        if options.divergence == "reverse_kl":
            return _dot(x.q, x.log_q - x.log_t) + tail_q * (tail_q / tail).log()
        return _dot(x.t, x.log_t - x.log_q) + tail * (tail / tail_q).log()
    base = _dot(x.t, x.log_t - x.log_q)
    if kind == "both_renormalized":
        return base + x.t.sum(-1) * torch.where(x.filled.any(-1), x.log_q.logsumexp(-1), 0.0)
    if kind == "tail_to_label":
        log_q_y = log_q.gather(1, y).squeeze(1)
        # The label's own entry, if kept, and its share of the tail have one logarithm between them.
        kept = torch.where(x.is_label, x.t, 0.0).sum(-1)
        return base + torch.xlogy(kept + x.tail, kept + x.tail) - _xlogx(kept) - _dot(x.tail[:, None], log_q_y[:, None])
    if kind == "uniform_tail":
        others = log_q.shape[1] - x.filled.sum(-1)
        each = torch.where(others > 0, x.tail / others.clamp_min(1), 0.0)
        rest = log_q.sum(-1) - torch.where(x.filled, x.log_q, 0.0).sum(-1)
        return base + _xlogx(each) * others - torch.where(each > 0, each * rest, 0.0)
    return base


class Coefficients(NamedTuple):
    """dD / d(z / T) = factor q + constant, with `delta` added at the kept entries and `at_label` at the label.

    [R, 1] but for `delta` [R, K].
    """

    factor: Tensor
    constant: Tensor
    delta: Tensor
    at_label: Tensor


def coefficients(x: Kept, vocab: int, options: RowOptions) -> Coefficients:
    """The derivative of `value` by hand."""
    kind, mass = options.teacher, x.t.sum(-1, keepdim=True)
    tail = x.tail[:, None]
    at_label = constant = torch.zeros_like(tail)
    if kind == "tail_bucket":
        tail_q = x.outside[:, None].clamp_min(TAIL_FLOOR)
        ratio = tail.clamp_min(TAIL_FLOOR) / tail_q
        if options.divergence == "reverse_kl":
            r = torch.where(x.q > 0, x.log_q - x.log_t, 0.0)
            r_tail = -ratio.log()
            factor = r_tail - ((x.q * r).sum(-1, keepdim=True) + tail_q * r_tail)
            delta = x.q * (r - r_tail)
        else:
            factor, delta = 1 - ratio, x.q * ratio - x.t
    elif kind == "both_renormalized":
        factor = torch.zeros_like(mass)
        delta = torch.where(x.filled, torch.softmax(x.log_q, -1), 0.0) * mass - x.t
        delta = torch.where(x.filled.any(-1, keepdim=True), delta, 0.0)
    elif kind == "tail_to_label":
        factor, delta, at_label = mass + tail, -x.t, -tail
    elif kind == "uniform_tail":
        others = vocab - x.filled.sum(-1, keepdim=True)
        each = torch.where(others > 0, tail / others.clamp_min(1), 0.0)
        factor, delta, constant = mass + each * others, each - x.t, -each
    else:
        factor, delta = mass, -x.t
    return Coefficients(factor, constant, torch.where(x.filled, delta, 0.0), at_label)


def slope(x: Kept, q: Tensor, y: Tensor, options: RowOptions) -> Tensor:
    """dD / d(z / T), [R, V]."""
    c = coefficients(x, q.shape[1], options)
    times = times_kept(x.ids, x.filled, q.shape[1]) if options.teacher == "tail_bucket" else None
    dense, delta = slope_parts(x, c, q, times, options)
    return dense.scatter_add(1, x.ids, delta).scatter_add(1, y, c.at_label)


def slope_parts(
    x: Kept, c: Coefficients, q: Tensor, times: Tensor | None, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """What the slope is made of, but for the label's: of each entry of q, and what a kept one adds to it.

    `times`: in how many slots each entry of q stands; only a tail bucket needs it.
    """
    dense = c.factor * q + c.constant
    if times is None or options.divergence != "forward_kl":
        return dense, c.delta
    # q - t at the kept entries as it stands: where the student is sure, factor q and delta are large and cancel.
    dense = torch.where(times > 0, q + (times - 1) * (1 - c.factor) * q, dense)
    return dense, torch.where(x.filled, -x.t, 0.0)


def label_log_target(x: Kept, vocab: int, options: RowOptions) -> Tensor:
    """Logarithm of the mass that the target gives the label, [R]; -inf for none."""
    kept = torch.where(x.is_label, x.t, 0.0).sum(-1)
    if options.teacher == "tail_to_label":
        return (kept + x.tail).log()
    if options.teacher == "uniform_tail":
        each = x.tail / (vocab - x.filled.sum(-1)).clamp_min(1)
        return torch.where(x.is_label.any(-1), kept, each).log()
    return kept.log()


def entropy(x: Kept, vocab: int, options: RowOptions) -> Tensor:
    """-sum of target log target, [R]."""
    total = -_xlogx(x.t).sum(-1)
    if options.teacher == "tail_bucket":
        return total - _xlogx(x.tail)
    if options.teacher == "tail_to_label":
        kept = torch.where(x.is_label, x.t, 0.0).sum(-1)
        return total + _xlogx(kept) - _xlogx(kept + x.tail)
    if options.teacher == "uniform_tail":
        others = vocab - x.filled.sum(-1)
        return total - others * _xlogx(x.tail / others.clamp_min(1))
    return total
