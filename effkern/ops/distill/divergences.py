"""The divergences of a dense teacher in plain PyTorch: value, and gradient by hand.

    z, u logits of student and teacher, q = softmax(z / T), p = softmax(u / T') or as given, S = sum p, y label

Every gradient with respect to z / T has the form w - q W with W = sum w, as D depends on z through q alone:
w = q dD/dq. The logit losses (mse, ..., cosine) stand outside of this; T is 1 for them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill.rows import RowOptions


class Pair(NamedTuple):
    """Both models over a vocabulary, [R, V]; y is [R, 1]."""

    z: Tensor
    u: Tensor
    q: Tensor
    log_q: Tensor
    p: Tensor
    log_p: Tensor
    y: Tensor


def kl(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """sum p x + q - p with x = log p - log q, [R]; the KL divergence where p and q have the same mass.

    0 log 0 = 0. Every term is non-negative, so that nothing cancels where the models agree.
    """
    x = torch.where(p > 0, x, 0.0)
    small = x.abs() < 0.5
    x_small = torch.where(small, x, 0.0)
    x_large = torch.where(small, 0.0, x)
    terms = torch.where(small & (p > 0), p * (x_small + torch.expm1(-x_small)), p * x_large + (q - p))
    return terms.sum(-1)


def _log_ratio(over: Tensor, under: Tensor) -> Tensor:
    """over - under of two logarithms, 0 where both are -inf."""
    return torch.where((over == -torch.inf) & (under == -torch.inf), 0.0, over - under)


class _Mixture(NamedTuple):
    """m = share p + (1 - share) q, and log(p / m), log(q / m)."""

    m: Tensor
    p_over_m: Tensor
    q_over_m: Tensor


def _mixture(x: Pair, share: float) -> _Mixture:
    m = share * x.p + (1 - share) * x.q
    # log(q / m) = -log(1 + share (p / q - 1)), or the same for p, from the term that makes up most of m: nothing
    # cancels. Far below 1 the argument is the sum of two positive terms, as a tiny share would be lost beside 1.
    gap = _log_ratio(x.log_p, x.log_q)
    p_wins = gap > (math.log((1 - share) / share) if 0 < share < 1 else math.inf * (0.5 - share))
    wins = p_wins.to(gap.dtype)
    of_other = wins * (1 - share) + (1 - wins) * share
    of_winner = wins * share + (1 - wins) * (1 - share)
    log_ratio = torch.where(p_wins, -gap, gap)
    less = of_other * torch.expm1(log_ratio)
    near = less > -0.5
    far = torch.where(near, 1, of_winner + of_other * torch.exp(log_ratio))
    above = torch.where(near, torch.log1p(torch.where(near, less, 0)), torch.log(far))
    p_over_m = torch.where(p_wins, -above, gap - above)
    q_over_m = torch.where(p_wins, -gap - above, -above)
    return _Mixture(m, p_over_m, q_over_m)


def _jsd(x: Pair, beta: float) -> Tensor:
    m = _mixture(x, beta)
    return beta * kl(x.p, m.m, m.p_over_m) + (1 - beta) * kl(x.q, m.m, m.q_over_m)


def _excess(x: Pair, options: RowOptions) -> Tensor:
    """S - 1, [R]. A softmax has the mass 1 by definition: the rounding of its sum would drown a small divergence."""
    return x.p.sum(-1) - 1 if options.teacher == "logprobs" else x.p.new_zeros(x.p.shape[0])


def _skew_forward_kl(x: Pair, options: RowOptions) -> Tensor:
    m = _mixture(x, options.alpha)
    return kl(x.p, m.m, m.p_over_m) + (1 - options.alpha) * _excess(x, options)


def _skew_reverse_kl(x: Pair, options: RowOptions) -> Tensor:
    m = _mixture(x, 1 - options.alpha)
    return kl(x.q, m.m, m.q_over_m) - (1 - options.alpha) * _excess(x, options)


def _forward_kl(x: Pair, options: RowOptions) -> Tensor:
    return kl(x.p, x.q, _log_ratio(x.log_p, x.log_q)) + _excess(x, options)


def _reverse_kl(x: Pair, options: RowOptions) -> Tensor:
    return kl(x.q, x.p, _log_ratio(x.log_q, x.log_p)) - _excess(x, options)


class _Apart(NamedTuple):
    """Label and rest: log-probabilities of both models without the label, and the mass of label and rest."""

    rest: Pair
    q_y: Tensor
    p_y: Tensor
    log_odds: tuple[Tensor, Tensor, Tensor, Tensor]


def _label_apart(x: Pair, options: RowOptions) -> _Apart:
    def split(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rest = logits.scatter(1, x.y, -torch.inf)
        # Around the largest, of which a logsumexp of large logits would round the fraction away.
        peak = rest.amax(-1, keepdim=True).detach().clamp_min(torch.finfo(rest.dtype).min)
        odds = ((logits.gather(1, x.y) - peak) - (rest - peak).logsumexp(-1, keepdim=True)).squeeze(1)
        one, two = torch.nn.functional.logsigmoid(odds), torch.nn.functional.logsigmoid(-odds)
        return torch.log_softmax(rest, -1), one, two

    log_q, log_q_y, log_q_rest = split(x.z / options.temperature)
    log_p, log_p_y, log_p_rest = split(x.u / options.teacher_temperature)
    rest = Pair(x.z, x.u, log_q.exp(), log_q, log_p.exp(), log_p, x.y)
    return _Apart(rest, log_q_y.exp(), log_p_y.exp(), (log_q_y, log_q_rest, log_p_y, log_p_rest))


def _decoupled_kl(x: Pair, options: RowOptions) -> Tensor:
    """alpha KL(label against rest) + beta KL(within the rest)."""
    split = _label_apart(x, options)
    log_q_y, log_q_rest, log_p_y, log_p_rest = split.log_odds
    p = torch.stack([split.p_y, log_p_rest.exp()], -1)
    q = torch.stack([split.q_y, log_q_rest.exp()], -1)
    binary = kl(p, q, torch.stack([log_p_y - log_q_y, log_p_rest - log_q_rest], -1))
    rest = split.rest
    within = kl(rest.p, rest.q, _log_ratio(rest.log_p, rest.log_q))
    # A weight of zero switches a term off, even where it is infinite.
    terms = [weight * term for weight, term in ((options.alpha, binary), (options.beta, within)) if weight > 0]
    return sum(terms, torch.zeros_like(binary))


def _standardised(x: Tensor, centre: bool, norm: str) -> tuple[Tensor, Tensor]:
    """x minus its mean (if `centre`), over its standard deviation ("sd") or length ("length"); and that factor.

    A row without spread or length stays at zero.
    """
    x = x - x.mean(-1, keepdim=True) if centre else x
    if norm == "none":
        return x, x.new_ones(x.shape[0], 1)
    square = x.square().mean(-1, keepdim=True) if norm == "sd" else x.square().sum(-1, keepdim=True)
    factor = torch.where(square > 0, torch.where(square > 0, square, 1.0).rsqrt(), 0.0)
    return x * factor, factor


# Centre, and what to divide by. D = sum (d - e)^2 / V, or half of the sum for unit vectors, d, e the results.
_LOGIT_LOSSES = {"mse": (False, "none"), "centered_mse": (True, "none"), "zscored_mse": (True, "sd"),
                 "cosine": (False, "length")}  # fmt: skip


def _logit_loss(x: Pair, name: str) -> Tensor:
    (d, _), (e, _) = (_standardised(logits, *_LOGIT_LOSSES[name]) for logits in (x.z, x.u))
    if name == "cosine":
        # Unit vectors: 1 - d . e, without cancellation; a zero vector has the cosine 0 with everything.
        half = 0.5 * (d - e).square().sum(-1)
        return torch.where((d == 0).all(-1) | (e == 0).all(-1), 1.0 + 0.0 * half, half)
    return (d - e).square().mean(-1)


def _logit_slope(x: Pair, name: str) -> Tensor:
    (d, factor), (e, _) = (_standardised(logits, *_LOGIT_LOSSES[name]) for logits in (x.z, x.u))
    share = 0.5 if name == "cosine" else 1.0 / x.z.shape[1]
    # Stretching z changes nothing after normalisation: the part of d - e along d goes.
    along = torch.zeros_like(d)
    if _LOGIT_LOSSES[name][1] == "sd":
        along = d * (1 - (d * e).mean(-1, keepdim=True))
    elif name == "cosine":
        along = d * (1 - (d * e).sum(-1, keepdim=True))
    return 2 * share * factor * (d - e - along)


def value(x: Pair, options: RowOptions) -> Tensor:
    """D of each row, [R], before its factor; differentiable in z by autograd."""
    name, beta = options.divergence, options.beta
    if name == "forward_kl":
        return _forward_kl(x, options)
    if name == "reverse_kl":
        return _reverse_kl(x, options)
    if name == "symmetric_kl":
        return beta * _forward_kl(x, options) + (1 - beta) * _reverse_kl(x, options)
    if name == "jsd":
        return _jsd(x, beta)
    if name == "skew_forward_kl":
        return _skew_forward_kl(x, options)
    if name == "skew_reverse_kl":
        return _skew_reverse_kl(x, options)
    if name == "tvd":
        return 0.5 * (x.p - x.q).abs().sum(-1)
    if name == "decoupled_kl":
        return _decoupled_kl(x, options)
    return _logit_loss(x, name)


def slope(x: Pair, options: RowOptions) -> Tensor:
    """dD / d(z / T), [R, V]: the derivative of `value` by hand."""
    name, alpha, beta = options.divergence, options.alpha, options.beta
    if name in _LOGIT_LOSSES:
        return _logit_slope(x, name)
    if name == "decoupled_kl":
        split = _label_apart(x, options)
        rest, pull = split.rest, (alpha * (split.q_y - split.p_y))[:, None]
        return (beta * (rest.q - rest.p) - rest.q * pull).scatter(1, x.y, pull)
    w = weight(x, options)
    return w - x.q * w.sum(-1, keepdim=True)


def weight(x: Pair, options: RowOptions) -> Tensor:
    """w = q dD/dq, [R, V]: entry by entry, so that a slice of the vocabulary can have its own; no logit losses here."""
    name, alpha, beta = options.divergence, options.alpha, options.beta
    if name == "forward_kl":
        return -x.p
    if name == "jsd":
        return (1 - beta) * x.q * _mixture(x, beta).q_over_m
    if name == "skew_forward_kl":
        return -(1 - alpha) * x.p * _mixture(x, alpha).q_over_m.exp()
    if name == "skew_reverse_kl":
        q_over_m = _mixture(x, 1 - alpha).q_over_m
        return x.q * (q_over_m - alpha * q_over_m.exp())
    if name == "tvd":
        # sign(nan) is 0.
        gap = x.q - x.p
        return 0.5 * x.q * torch.where(gap.isnan(), gap, torch.sign(gap))
    r = torch.where(x.q > 0, _log_ratio(x.log_q, x.log_p), 0.0)
    if name == "reverse_kl":
        return x.q * r
    assert name == "symmetric_kl"
    return (1 - beta) * x.q * r - beta * x.p
