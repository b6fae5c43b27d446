"""The row pass over a slice of the vocabulary: what its rank sums up, and what it makes of the sums of all ranks.

    R rows, V vocabulary, v entries of it in this slice; z, u logits of student and teacher, q, p their softmax

`maxima`, then MAX over the ranks; `sums`, then SUM; for divergences of three passes `weight_sum`, then SUM; `finish`.
Sums are taken relative to the maxima of all ranks, so they add up as they are. One process with reductions that change
nothing runs the same code.
"""

import torch
from torch import Tensor

from effkern.ops.distill import divergences
from effkern.ops.distill.divergences import Pair
from effkern.ops.distill.parallel import kept, moments
from effkern.ops.distill.parallel.slices import Columns, Slice, add_at, at_label, largest, owned
from effkern.ops.distill.rows import DIVERGENCES, RowOptions


def three_passes(options: RowOptions, dense_teacher: bool) -> bool:
    """Whether the sum of w = q dD/dq needs normalised p and q, and with that a reduction of its own."""
    return dense_teacher and DIVERGENCES[options.divergence].passes == 3


def maxima(x: Slice, options: RowOptions) -> Columns:
    """This slice's largest logits, each [R]."""
    top = {"z": largest(x.z_Rv)}
    if x.u_Rv is not None:
        top["u"] = largest(x.u_Rv)
        top |= moments.maxima(x, options)
    return top


def _shifted(values_Rv: Tensor, top_R: Tensor) -> Tensor:
    """values minus the row's maximum over all ranks; a row of -inf stays as it is."""
    return values_Rv - torch.where(top_R == -torch.inf, 0.0, top_R)[:, None]


def _log_total(top_R: Tensor, sum_R: Tensor) -> Tensor:
    """log sum exp, from the maximum and the sum relative to it."""
    return torch.where(top_R == -torch.inf, 0.0, top_R) + sum_R.log()


def sums(x: Slice, top: Columns, options: RowOptions) -> Columns:
    """This slice's sums, each [R], and its entries of a sparse teacher, [R, K]."""
    t_q, t_p = options.temperature, options.teacher_temperature
    z = _shifted(x.z_Rv, top["z"])
    total = {"z1": z.exp().sum(-1)}
    a = z / t_q
    if t_q != 1.0:
        total["z"] = a.exp().sum(-1)
    if x.ids_RK is not None:
        total["kept_z"] = kept.logits(x)
        if options.teacher == "tail_bucket":
            total["outside"] = kept.outside(x, a.exp())
    if x.u_Rv is None:
        return total
    b = _shifted(x.u_Rv, top["u"]) / (1.0 if options.teacher == "logprobs" else t_p)
    total["u"] = b.exp().sum(-1)
    if options.divergence in ("reverse_kl", "symmetric_kl"):
        mass = a.exp()
        total["gap"] = torch.where(mass > 0, mass * (a - b), 0.0).sum(-1)
    return total | moments.sums(x, top, options)


def _teacher_lse(top: Columns, total: Columns, options: RowOptions) -> Tensor:
    """log sum exp (u / T'), or log S of log-probabilities."""
    t_p = 1.0 if options.teacher == "logprobs" else options.teacher_temperature
    return _log_total(top["u"] / t_p, total["u"])


def _pair(x: Slice, log_q: Tensor, top: Columns, total: Columns, options: RowOptions) -> Pair:
    """Both models over this slice, normalised over all."""
    assert x.u_Rv is not None
    if options.teacher == "logprobs":
        log_p = x.u_Rv
    else:
        log_p = _shifted(x.u_Rv, top["u"]) / options.teacher_temperature - total["u"].log()[:, None]
    return Pair(x.z_Rv, x.u_Rv, log_q.exp(), log_q, log_p.exp(), log_p, x.y_R1)


def _log_q(x: Slice, top: Columns, total: Columns, options: RowOptions) -> Tensor:
    return _shifted(x.z_Rv, top["z"]) / options.temperature - total.get("z", total["z1"]).log()[:, None]


def weight_sum(x: Slice, top: Columns, total: Columns, options: RowOptions) -> Columns:
    """This slice's part of W = sum w, [R]: only where `three_passes`."""
    pair = _pair(x, _log_q(x, top, total, options), top, total, options)
    return {"w": divergences.weight(pair, options).sum(-1)}


def _whole_weight(top: Columns, total: Columns, options: RowOptions) -> Tensor:
    """W = sum w over all ranks, [R], of a divergence of two passes, from the sums."""
    as_given = options.teacher == "logprobs"
    mass = _teacher_lse(top, total, options).exp() if as_given else torch.ones_like(top["u"])
    if options.divergence == "forward_kl":
        return -mass
    # sum q log(q / p), from sums relative to the maxima.
    log_q_total = total.get("z", total["z1"]).log()
    log_p_total = -torch.where(top["u"] == -torch.inf, 0.0, top["u"]) if as_given else total["u"].log()
    reverse = total["gap"] / total.get("z", total["z1"]) - log_q_total + log_p_total
    if options.divergence == "reverse_kl":
        return reverse
    return (1 - options.beta) * reverse - options.beta * mass


def _dense_soft(x: Slice, pair: Pair, top: Columns, total: Columns, options: RowOptions) -> tuple[Tensor, Tensor]:
    """dD / d(z / T) on this slice, [R, v], and the share of D, [R]."""
    special = moments.soft(x, top, total, options)
    if special is not None:
        return special
    whole = total["w"] if "w" in total else _whole_weight(top, total, options)
    slope = divergences.weight(pair, options) - pair.q * whole[:, None]
    # Sums over entries, plus a constant that must count once.
    nothing = Pair(*(part[:, :0] for part in pair))
    share = divergences.value(pair, options) - torch.where(x.own_R, 0.0, divergences.value(nothing, options))
    return slope, share


def _entropy(mass: Tensor, log_mass: Tensor) -> Tensor:
    return -torch.where(mass > 0, mass * log_mass, 0.0).sum(-1)


def finish(
    x: Slice, top: Columns, total: Columns, options: RowOptions, grad_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor]:
    """d (scale loss) / d raw on this slice as `grad_dtype` (None: no gradient), and the shares of the statistics.

    The shares [13, R] of all ranks add up to the rows of DistillStats, but for agreement, which may count twice.
    """
    o, omega = options, x.omega_R
    zero = x.z_Rv.new_zeros(x.z_Rv.shape[0])
    lse = _log_total(top["z"], total["z1"])
    z_y = at_label(x, x.z_Rv)
    ce = smoothed = owned(x, lse - z_y)
    if o.label_smoothing > 0:
        smoothed = (1 - o.label_smoothing) * ce + o.label_smoothing * (owned(x, lse) - x.z_Rv.sum(-1) / x.vocab)
    log_q = _log_q(x, top, total, o)

    soft, kd = None, zero
    teacher_lse = log_p_y = teacher_entropy = teacher_hit = agreement = zero
    if x.u_Rv is not None:
        pair = _pair(x, log_q, top, total, o)
        soft, kd = _dense_soft(x, pair, top, total, o)
        teacher_lse = owned(x, _teacher_lse(top, total, o))
        log_p_y = at_label(x, pair.log_p)
        teacher_entropy = _entropy(pair.p, pair.log_p)
        teacher_hit = owned(x, (at_label(x, x.u_Rv) == top["u"]).to(zero.dtype))
        both = (x.z_Rv == top["z"][:, None]) & (x.u_Rv == top["u"][:, None])
        agreement = both.any(-1).to(zero.dtype)
    elif x.ids_RK is not None:
        log_q_at = (total["kept_z"] - top["z"][:, None]) / o.temperature - total.get("z", total["z1"]).log()[:, None]
        outside = total["outside"] / total.get("z", total["z1"]) if "outside" in total else None
        target = kept.target(x, log_q_at, outside, o)
        soft = kept.slope(x, target, log_q.exp(), o)
        kd = kept.share(x, target, log_q, o)
        teacher_lse, log_p_y, teacher_entropy, teacher_hit, agreement = (
            owned(x, column) for column in kept.stats(x, target, total["kept_z"] == top["z"][:, None], o)
        )
    kd = o.divergence_scale * kd
    if soft is not None:
        soft = o.divergence_scale / o.temperature * soft

    loss = torch.where(omega < 1, (1 - omega) * smoothed, 0.0) + torch.where(omega > 0, omega * kd, 0.0)
    if o.z_loss > 0:
        loss = loss + owned(x, o.z_loss * lse.square())
    columns = (
        loss, ce, kd, owned(x, lse), teacher_lse, at_label(x, log_q), log_p_y, _entropy(log_q.exp(), log_q),
        teacher_entropy, owned(x, (z_y == top["z"]).to(zero.dtype)), teacher_hit, _ratio(x, soft, z_y - lse), agreement,
    )  # fmt: skip
    shares = torch.stack([torch.where(x.valid_R, column, 0.0) for column in columns])
    return (None if grad_dtype is None else _grad(x, soft, top, total, lse, o).to(grad_dtype)), shares


def _ratio(x: Slice, soft: Tensor | None, log_q_y: Tensor) -> Tensor:
    """(1 - omega) + omega (dD / dz_y) / (q_y - 1), q at temperature 1."""
    ratio = 1 - x.omega_R
    if soft is not None:
        miss = -torch.expm1(log_q_y)
        part = torch.where(miss > 0, -at_label(x, soft) / torch.where(miss > 0, miss, 1.0), 0.0)
        ratio = ratio + torch.where(x.omega_R > 0, x.omega_R * part, 0.0)
    return owned(x, ratio)


def _grad(x: Slice, soft: Tensor | None, top: Columns, total: Columns, lse: Tensor, options: RowOptions) -> Tensor:
    """scale ((1 - omega) (q1 - target) + 2 c lse q1 + omega dD / dz) times k (1 - (z / cap)^2), q1 = softmax(z)."""
    o, omega = options, x.omega_R[:, None]
    q1 = (_shifted(x.z_Rv, top["z"]) - total["z1"].log()[:, None]).exp()
    target = torch.ones_like(omega) * (1 - o.label_smoothing)
    miss = add_at(q1, x.y_R1, x.own_R[:, None], -target)
    if o.label_smoothing > 0:
        miss = miss - o.label_smoothing / x.vocab
    g = (1 - omega) * miss
    if o.z_loss > 0:
        g = g + 2 * o.z_loss * lse[:, None] * q1
    if soft is not None:
        g = g + torch.where(omega > 0, omega * soft, 0.0)
    if o.softcap is not None:
        g = g * (1 - (x.z_Rv / o.softcap).square())
    if o.logit_scale != 1.0:
        g = g * o.logit_scale
    scale = x.scale_R[:, None]
    return torch.where(x.valid_R[:, None] & (scale != 0), scale * g, 0.0)
