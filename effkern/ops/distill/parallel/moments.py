"""The divergences that are no sum over w = q dD/dq: label apart from the rest, and the losses on the logits.

    R rows, V vocabulary, v entries of it in this slice; z, u logits of student and teacher

Means and deviations of a slice are merged relative to the largest of the slices' means (Chan et al.): large logits do
not cancel.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from effkern.ops.distill import divergences
from effkern.ops.distill.parallel.slices import Columns, Slice, add_at, at_label, largest, owned
from effkern.ops.distill.rows import DIVERGENCES, RowOptions

CENTRED = ("centered_mse", "zscored_mse")


def _both(x: Slice) -> dict[str, Tensor]:
    assert x.u_Rv is not None
    return {"z": x.z_Rv, "u": x.u_Rv}


def _rest(x: Slice, values_Rv: Tensor) -> Tensor:
    """The logits with the label masked."""
    if values_Rv.shape[1] == 0:
        return values_Rv
    label = torch.where(x.own_R[:, None], -torch.inf, values_Rv.gather(1, x.y_R1))
    return values_Rv.scatter(1, x.y_R1, label)


def _mean(values_Rv: Tensor) -> Tensor:
    if values_Rv.shape[1] == 0:
        return values_Rv.new_full((values_Rv.shape[0],), -torch.inf)
    return values_Rv.mean(-1)


def maxima(x: Slice, options: RowOptions) -> Columns:
    """What else needs a MAX, each [R]."""
    if options.divergence == "decoupled_kl":
        return {f"{name}_rest": largest(_rest(x, values)) for name, values in _both(x).items()}
    if options.divergence in CENTRED:
        return {f"{name}_mean": _mean(values) for name, values in _both(x).items()}
    return {}


def sums(x: Slice, top: Columns, options: RowOptions) -> Columns:
    """What else needs a SUM, each [R]."""
    both = _both(x)
    if options.divergence == "decoupled_kl":
        parts = {}
        for (name, values), t in zip(both.items(), (options.temperature, options.teacher_temperature)):
            rest = _rest(x, values) - top[f"{name}_rest"][:, None]
            parts[f"{name}_rest"] = (rest / t).exp().sum(-1)
            parts[f"{name}_y"] = at_label(x, values)
        return parts
    if options.divergence in CENTRED:
        return _centred_sums(both, top)
    if options.divergence == "cosine":
        z, u = both["z"], both["u"]
        return {"zz": z.square().sum(-1), "uu": u.square().sum(-1), "zu": (z * u).sum(-1)}
    return {}


def _centred_sums(both: dict[str, Tensor], top: Columns) -> Columns:
    """First moments about the largest mean, and second ones within the slice and of its mean."""
    width = both["z"].shape[1]
    if width == 0:
        zero = both["z"].new_zeros(both["z"].shape[0])
        return dict.fromkeys(("z_off", "u_off", "zz", "uu", "zu"), zero)
    off, within = {}, {}
    for name, values in both.items():
        mean = _mean(values)
        off[name] = mean - top[f"{name}_mean"]
        within[name] = values - mean[:, None]
    parts = {f"{name}_off": width * off[name] for name in both}
    for a, b in ("zz", "uu", "zu"):
        parts[a + b] = (within[a] * within[b]).sum(-1) + width * off[a] * off[b]
    return parts


def soft(x: Slice, top: Columns, total: Columns, options: RowOptions) -> tuple[Tensor, Tensor] | None:
    """dD / d(z / T) on this slice, [R, v], and the share of D, [R]; None for the other divergences."""
    if options.divergence == "decoupled_kl":
        return _decoupled(x, top, total, options)
    if DIVERGENCES[options.divergence].tempered:
        return None
    return _logit_loss(x, top, total, options.divergence)


def _decoupled(x: Slice, top: Columns, total: Columns, options: RowOptions) -> tuple[Tensor, Tensor]:
    logs: list[Tensor] = []
    masses: list[Tensor] = []
    rests: list[Tensor] = []
    for (name, values), t in zip(_both(x).items(), (options.temperature, options.teacher_temperature)):
        within = total[f"{name}_rest"].log()
        odds = (total[f"{name}_y"] - top[f"{name}_rest"]) / t - within
        logs.append(torch.stack([logsigmoid(odds), logsigmoid(-odds)], -1))
        masses.append(logs[-1].exp())
        rests.append((_rest(x, values) - top[f"{name}_rest"][:, None]) / t - within[:, None])
    (q, p), (log_q, log_p), (log_q_rest, log_p_rest) = masses, logs, rests
    binary = divergences.kl(p, q, log_p - log_q)
    q_rest, p_rest = log_q_rest.exp(), log_p_rest.exp()
    within_rest = divergences.kl(p_rest, q_rest, log_p_rest - log_q_rest)
    pull = (options.alpha * (q[:, 0] - p[:, 0]))[:, None]
    slope = options.beta * (q_rest - p_rest) - q_rest * pull
    # Both models have the mass 0 at the label, so that the pull stands there alone.
    slope = add_at(slope, x.y_R1, x.own_R[:, None], pull)
    return slope, owned(x, options.alpha * binary) + options.beta * within_rest


def _reciprocal_root(square_R: Tensor) -> Tensor:
    """1 / sqrt, 0 for a row without spread or length."""
    return torch.where(square_R > 0, torch.where(square_R > 0, square_R, 1.0).rsqrt(), 0.0)


def _logit_loss(x: Slice, top: Columns, total: Columns, name: str) -> tuple[Tensor, Tensor]:
    """D = sum (d - e)^2 / V, or half of the sum for unit vectors; d, e the logits, centred and scaled."""
    both = _both(x)
    factor = {"z": torch.ones_like(top["z"]), "u": torch.ones_like(top["u"])}
    d_dot_e = torch.ones_like(top["z"])
    if name in CENTRED:
        mean_off = {key: total[f"{key}_off"] / x.vocab for key in both}
        both = {key: values - (top[f"{key}_mean"] + mean_off[key])[:, None] for key, values in both.items()}
    if name == "zscored_mse":
        second = {a + b: total[a + b] / x.vocab - mean_off[a] * mean_off[b] for a, b in ("zz", "uu", "zu")}
    elif name == "cosine":
        second = {key: total[key] for key in ("zz", "uu", "zu")}
    else:
        second = None
    if second is not None:
        factor = {"z": _reciprocal_root(second["zz"]), "u": _reciprocal_root(second["uu"])}
        d_dot_e = factor["z"] * factor["u"] * second["zu"]
    d, e = (both[key] * factor[key][:, None] for key in ("z", "u"))
    part = 0.5 if name == "cosine" else 1.0 / x.vocab
    share = part * (d - e).square().sum(-1)
    if name == "cosine":
        flat = (second["zz"] == 0) | (second["uu"] == 0)  # type: ignore[index]
        share = torch.where(flat, owned(x, torch.ones_like(share)), share)
    # Stretching z changes nothing after normalisation: the part of d - e along d goes.
    slope = d - e if second is None else d - e - d * (1 - d_dot_e)[:, None]
    return 2 * part * factor["z"][:, None] * slope, share
