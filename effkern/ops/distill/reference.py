"""The loss in plain PyTorch, in the paper's symbols: the oracle of every other implementation.

z student logits, u teacher logits, q = softmax(z / T), p = softmax(u / T'), y label, eps label smoothing
L_n = (1 - omega) CE_n + omega D(p_n, q_n) + c lse(z_n)^2
"""

from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill import divergences, sparse
from effkern.ops.distill.rows import RowOptions, Rows


def cap(s: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """z = c tanh(k s / c), or k s without a cap."""
    s = s if logit_scale == 1.0 else s * logit_scale
    return s if softcap is None else softcap * torch.tanh(s / softcap)


class _Row(NamedTuple):
    """What values and gradients share: student, and dense or sparse teacher, with ignored rows replaced."""

    z: Tensor
    valid: Tensor
    y: Tensor
    log_q: Tensor
    pair: divergences.Pair | None
    kept: sparse.Kept | None


def _prepare(rows: Rows, options: RowOptions) -> _Row:
    o = options
    acc = torch.promote_types(rows.logits_RV.dtype, torch.float32)
    raw = rows.logits_RV.to(acc)
    z = cap(raw if rows.bias_V is None else raw + rows.bias_V.to(acc), o.logit_scale, o.softcap)
    valid = rows.labels_R != o.ignore_index
    # An ignored row is replaced, not multiplied by zero: it may hold inf or NaN.
    z = torch.where(valid[:, None], z, 0.0)
    y = torch.where(valid, rows.labels_R, 0).long()[:, None]
    log_q = torch.log_softmax(z / o.temperature, -1)
    pair = kept = None
    if rows.teacher_RV is not None:
        u = torch.where(valid[:, None], rows.teacher_RV[:, : z.shape[1]].to(acc), 0.0)
        log_p = u if o.teacher == "logprobs" else torch.log_softmax(u / o.teacher_temperature, -1)
        pair = divergences.Pair(z, u, log_q.exp(), log_q, log_p.exp(), log_p, y)
    elif rows.ids_RK is not None:
        assert rows.logprobs_RK is not None
        ids = torch.where(valid[:, None], rows.ids_RK, -1)
        kept = sparse.gather(log_q, ids, rows.logprobs_RK, y, o)
    return _Row(z, valid, y, log_q, pair, kept)


def row_stats(rows: Rows, options: RowOptions) -> Tensor:
    """The rows of DistillStats, stacked: [13, R]. Differentiable in `logits_RV` through row 0."""
    o, omega = options, rows.omega_R
    x = _prepare(rows, o)
    z, y = x.z, x.y
    zero = z.new_zeros(z.shape[0])

    lse = torch.logsumexp(z, -1)
    ce = lse - z.gather(1, y).squeeze(1)
    smoothed = ce
    if o.label_smoothing > 0:
        smoothed = (1 - o.label_smoothing) * ce + o.label_smoothing * (lse - z.mean(-1))
    q = x.log_q.exp()
    largest = z == z.amax(-1, keepdim=True)
    hit = largest.gather(1, y).squeeze(1)
    # Detached: the (zero) gradient of a masked entry would be 0 * -inf.
    entropy = -torch.where(q > 0, q * x.log_q, 0.0).sum(-1).detach()

    kd = teacher_lse = log_p_y = teacher_entropy = teacher_hit = agreement = zero
    if x.pair is not None:
        pair = x.pair
        kd = divergences.value(pair, o)
        log_p_y = pair.log_p.gather(1, y).squeeze(1)
        teacher_lse = torch.logsumexp(pair.u / (1.0 if o.teacher == "logprobs" else o.teacher_temperature), -1)
        teacher_entropy = -torch.where(pair.p > 0, pair.p * pair.log_p, 0.0).sum(-1)
        teacher_largest = pair.u == pair.u.amax(-1, keepdim=True)
        teacher_hit = teacher_largest.gather(1, y).squeeze(1)
        agreement = (largest & teacher_largest).any(-1)
    elif x.kept is not None:
        assert rows.logprobs_RK is not None
        kept = x.kept
        kd = sparse.value(kept, x.log_q, y, o)
        log_p_y = sparse.label_log_target(kept, z.shape[1], o)
        teacher_lse = torch.where(kept.filled, rows.logprobs_RK.to(z.dtype), -torch.inf).logsumexp(-1)
        teacher_entropy = sparse.entropy(kept, z.shape[1], o)
        teacher_largest = kept.filled & (kept.t == kept.t.amax(-1, keepdim=True)) & (kept.t > 0)
        teacher_hit = (teacher_largest & kept.is_label).any(-1)
        agreement = (teacher_largest & largest.gather(1, kept.ids)).any(-1)
    kd = o.divergence_scale * kd

    # A weight of zero switches a term off, even where it is infinite.
    loss = torch.where(omega < 1, (1 - omega) * smoothed, 0.0)
    loss = loss + torch.where(omega > 0, omega * kd, 0.0)
    if o.z_loss > 0:
        loss = loss + o.z_loss * lse.square()
    with torch.no_grad():
        ratio = _gradient_ratio(x, omega, o)
    columns = (
        loss, ce, kd, lse, teacher_lse, x.log_q.gather(1, y).squeeze(1), log_p_y, entropy, teacher_entropy,
        hit.to(z.dtype), teacher_hit.to(z.dtype), ratio, agreement.to(z.dtype),
    )  # fmt: skip
    return torch.stack([torch.where(x.valid, column, 0.0) for column in columns])


def _soft_slope(x: _Row, options: RowOptions) -> Tensor | None:
    """d (factor D) / dz, [R, V]."""
    factor = options.divergence_scale / options.temperature
    if x.pair is not None:
        return factor * divergences.slope(x.pair, options)
    if x.kept is not None:
        return factor * sparse.slope(x.kept, x.log_q.exp(), x.y, options)
    return None


def _gradient_ratio(x: _Row, omega: Tensor, options: RowOptions) -> Tensor:
    """(1 - omega) + omega (dD / dz_y) / (q_y - 1)."""
    soft = _soft_slope(x, options)
    if soft is None:
        return 1 - omega
    miss = -torch.expm1(torch.log_softmax(x.z, -1).gather(1, x.y).squeeze(1))
    at_label = soft.gather(1, x.y).squeeze(1)
    ratio = torch.where(miss > 0, -at_label / torch.where(miss > 0, miss, 1.0), 0.0)
    return (1 - omega) + torch.where(omega > 0, omega * ratio, 0.0)


def row_grad(rows: Rows, options: RowOptions) -> Tensor:
    """d loss / d raw of each row, [R, V]: the derivatives of `row_stats` by hand.

    g = (1 - omega) (q1 - (1 - eps) e_y - eps / V) + 2 c lse q1 + omega dD / dz,  q1 = softmax(z)
    times k (1 - (z / cap)^2) for scale and softcap.
    """
    o, omega = options, rows.omega_R[:, None]
    x = _prepare(rows, o)
    q1 = torch.softmax(x.z, -1)
    one_hot = torch.zeros_like(x.z).scatter_(1, x.y, 1.0)
    target = (1 - o.label_smoothing) * one_hot + o.label_smoothing / x.z.shape[1]
    g = (1 - omega) * (q1 - target)
    if o.z_loss > 0:
        g = g + 2 * o.z_loss * torch.logsumexp(x.z, -1, keepdim=True) * q1
    soft = _soft_slope(x, o)
    if soft is not None:
        g = g + torch.where(omega > 0, omega * soft, 0.0)
    if o.softcap is not None:
        g = g * (1 - (x.z / o.softcap).square())
    if o.logit_scale != 1.0:
        g = g * o.logit_scale
    return torch.where(x.valid[:, None], g, 0.0)


def reference_rows(rows: Rows, grad_dtype: torch.dtype | None, options: RowOptions) -> Tensor | None:
    """Fill `stats_SR`; return d(sum scale * loss)/d(raw logits) as `grad_dtype`, or None where that is None.

    The gradient may live in the memory of `logits_RV`. This is the plain PyTorch pass.
    """
    rows.stats_SR.copy_(row_stats(rows, options))
    if grad_dtype is None:
        return None
    scale = rows.scale_R[:, None]
    return torch.where(scale != 0, scale * row_grad(rows, options), 0.0).to(grad_dtype)


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    options: RowOptions,
    omega: Tensor | float = 0.0,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    vocab_valid: int | None = None,
    reduction: str = "mean",
    denom: Tensor | float | None = None,
) -> Tensor:
    """The whole loss with all N x V logits live, differentiable by autograd: for tests and as the eager baseline.

    `teacher` is a tensor of logits (log-probabilities), or (ids, logprobs); options.teacher says which.
    """
    valid_rows = weight.shape[0] if vocab_valid is None else vocab_valid
    raw = hidden @ weight[:valid_rows].t()
    rows = raw.shape[0]
    acc = torch.promote_types(raw.dtype, torch.float32)
    omega_N = torch.as_tensor(omega, dtype=acc, device=raw.device).expand(rows)
    bias = None if bias is None else bias[:valid_rows]
    dense = None if isinstance(teacher, tuple) else teacher
    ids, logprobs = teacher if isinstance(teacher, tuple) else (None, None)
    loss_N = row_stats(Rows(raw, dense, ids, logprobs, bias, labels, omega_N, omega_N, omega_N), options)[0]
    kept = (labels != options.ignore_index).to(loss_N.dtype)
    weights_N = kept if weights is None else kept * weights.to(loss_N.dtype)
    if reduction == "none":
        return weights_N * loss_N
    total = (weights_N * loss_N).sum()
    if reduction == "sum":
        return total
    count = weights_N.sum() if denom is None else torch.as_tensor(denom, dtype=loss_N.dtype)
    return torch.where(count == 0, 0.0 * total, total / torch.where(count == 0, 1.0, count))
