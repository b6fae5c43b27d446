"""The loss in plain PyTorch, in the paper's symbols: the oracle of every other implementation.

z student logits, u teacher logits, q = softmax(z / T), p = softmax(u / T'), y label, eps label smoothing
L_n = (1 - omega) CE_n + omega D(p_n, q_n) + c lse(z_n)^2
"""

import torch
from torch import Tensor

from effkern.ops.distill.rows import RowOptions, Rows


def cap(s: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """z = c tanh(k s / c), or k s without a cap."""
    s = s if logit_scale == 1.0 else s * logit_scale
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def forward_kl(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q), with 0 log 0 = 0.

    Each term is taken as p x + q - p with x = log p - log q: the same sum, as p and q both sum to one, but every
    term is non-negative, so that nothing cancels where the models agree.
    """
    x = torch.where(p > 0, log_p - log_q, 0.0)
    small = x.abs() < 0.5
    x_small = torch.where(small, x, 0.0)
    x_large = torch.where(small, 0.0, x)
    terms = torch.where(small & (p > 0), p * (x_small + torch.expm1(-x_small)), p * x_large + (q - p))
    return terms.sum(-1)


def row_stats(
    raw: Tensor, u: Tensor | None, bias: Tensor | None, labels: Tensor, omega: Tensor, options: RowOptions
) -> Tensor:
    """The rows of DistillStats, stacked: [11, R]. Differentiable in `raw` [R, V] through row 0."""
    acc = torch.promote_types(raw.dtype, torch.float32)
    raw = raw.to(acc)
    z = cap(raw if bias is None else raw + bias.to(acc), options.logit_scale, options.softcap)
    valid = labels != options.ignore_index
    # An ignored row is replaced, not multiplied by zero: it may hold inf or NaN.
    z = torch.where(valid[:, None], z, 0.0)
    y = torch.where(valid, labels, 0).long()[:, None]
    zero = z.new_zeros(z.shape[0])

    lse = torch.logsumexp(z, -1)
    ce = lse - z.gather(1, y).squeeze(1)
    smoothed = ce
    if options.label_smoothing > 0:
        smoothed = (1 - options.label_smoothing) * ce + options.label_smoothing * (lse - z.mean(-1))
    log_q = torch.log_softmax(z / options.temperature, -1)
    q = log_q.exp()
    hit = (z.gather(1, y).squeeze(1) >= z.amax(-1)).to(acc)
    # Detached: the (zero) gradient of a masked entry would be 0 * -inf.
    entropy = -torch.where(q > 0, q * log_q, 0.0).sum(-1).detach()

    if u is None:
        kd = teacher_lse = log_p_y = teacher_entropy = teacher_hit = zero
    else:
        u = torch.where(valid[:, None], u[:, : z.shape[1]].to(acc), 0.0)
        log_p = torch.log_softmax(u / options.teacher_temperature, -1)
        p = log_p.exp()
        kd = forward_kl(p, log_p, q, log_q)
        teacher_lse = torch.logsumexp(u / options.teacher_temperature, -1)
        log_p_y = log_p.gather(1, y).squeeze(1)
        teacher_entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
        teacher_hit = (u.gather(1, y).squeeze(1) >= u.amax(-1)).to(acc)

    # A weight of zero switches a term off, even where it is infinite.
    loss = torch.where(omega < 1, (1 - omega) * smoothed, 0.0)
    loss = loss + torch.where(omega > 0, omega * kd, 0.0)
    if options.z_loss > 0:
        loss = loss + options.z_loss * lse.square()
    rows = (
        loss, ce, kd, lse, teacher_lse, log_q.gather(1, y).squeeze(1), log_p_y, entropy, teacher_entropy, hit,
        teacher_hit,
    )  # fmt: skip
    return torch.stack([torch.where(valid, row, 0.0) for row in rows])


def row_grad(
    raw: Tensor, u: Tensor | None, bias: Tensor | None, labels: Tensor, omega: Tensor, options: RowOptions
) -> Tensor:
    """d loss / d raw of each row, [R, V]: the derivatives of `row_stats` by hand.

    g = (1 - omega) (q1 - (1 - eps) e_y - eps / V) + 2 c lse q1 + omega / T (q - p),  q1 = softmax(z)
    times k (1 - (z / cap)^2) for scale and softcap.
    """
    o = options
    acc = torch.promote_types(raw.dtype, torch.float32)
    raw = raw.to(acc)
    z = cap(raw if bias is None else raw + bias.to(acc), o.logit_scale, o.softcap)
    valid = labels != o.ignore_index
    y = torch.where(valid, labels, 0).long()[:, None]
    hard = (1 - omega)[:, None]
    q1 = torch.softmax(z, -1)
    one_hot = torch.zeros_like(z).scatter_(1, y, 1.0)
    target = (1 - o.label_smoothing) * one_hot + o.label_smoothing / z.shape[1]
    g = hard * (q1 - target)
    if o.z_loss > 0:
        g = g + 2 * o.z_loss * torch.logsumexp(z, -1, keepdim=True) * q1
    if u is not None:
        p = torch.softmax(u[:, : z.shape[1]].to(acc) / o.teacher_temperature, -1)
        q = q1 if o.temperature == 1.0 else torch.softmax(z / o.temperature, -1)
        g = g + torch.where(omega[:, None] > 0, omega[:, None] / o.temperature * (q - p), 0.0)
    if o.softcap is not None:
        g = g * (1 - (z / o.softcap).square())
    if o.logit_scale != 1.0:
        g = g * o.logit_scale
    return torch.where(valid[:, None], g, 0.0)


def reference_rows(rows: Rows, grad_dtype: torch.dtype | None, options: RowOptions) -> Tensor | None:
    """Fill `stats_SR`; return d(sum scale * loss)/d(raw logits) as `grad_dtype`, or None where that is None.

    The gradient may live in the memory of `logits_RV`. This is the plain PyTorch pass.
    """
    args = (rows.logits_RV, rows.teacher_RV, rows.bias_V, rows.labels_R, rows.omega_R, options)
    rows.stats_SR.copy_(row_stats(*args))
    if grad_dtype is None:
        return None
    scale = rows.scale_R[:, None]
    return torch.where(scale != 0, scale * row_grad(*args), 0.0).to(grad_dtype)


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    options: RowOptions,
    omega: Tensor | float = 0.0,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    vocab_valid: int | None = None,
    reduction: str = "mean",
    denom: Tensor | float | None = None,
) -> Tensor:
    """The whole loss with all N x V logits live, differentiable by autograd: for tests and as the eager baseline."""
    valid_rows = weight.shape[0] if vocab_valid is None else vocab_valid
    raw = hidden @ weight[:valid_rows].t()
    rows = raw.shape[0]
    omega_N = torch.as_tensor(omega, dtype=torch.promote_types(raw.dtype, torch.float32)).expand(rows)
    bias = None if bias is None else bias[:valid_rows]
    loss_N = row_stats(raw, teacher_logits, bias, labels, omega_N, options)[0]
    kept = (labels != options.ignore_index).to(loss_N.dtype)
    weights_N = kept if weights is None else kept * weights.to(loss_N.dtype)
    if reduction == "none":
        return weights_N * loss_N
    total = (weights_N * loss_N).sum()
    if reduction == "sum":
        return total
    count = weights_N.sum() if denom is None else torch.as_tensor(denom, dtype=loss_N.dtype)
    return torch.where(count == 0, 0.0 * total, total / torch.where(count == 0, 1.0, count))
