"""The Triton row pass with a dense teacher: one program per row, two or three passes over it.

Statistics; where the divergence needs it, one sum over normalised p and q (W, or the moments of the logits); values
and gradient. A row that fits in one block is read once and stays in registers (RESIDENT). Sums are kept per lane and
added up after the pass, so that a step of the last passes waits for no other thread.

When the gradient replaces the logits, nobody may still read what another thread overwrites: every pass but the last
ends in sums over the row, which all threads wait for, and the label's logit is read before the first.
"""

import triton
import triton.language as tl

from effkern.ops.distill.triton_common import (
    LOWEST,
    clear_row,
    gradient_ratio,
    kl_terms,
    log_ratio,
    no_sum,
    part,
    raw_grad,
    shift,
    store_stats,
    student_logits,
    times,
    total,
    with_label,
)
from effkern.ops.distill.triton_divergences import binary_kl, sum_of_weights, terms


@triton.jit
def _load_pair(
    logits_ptr, teacher_ptr, bias_ptr, cols, vocab, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
):
    z = student_logits(logits_ptr, bias_ptr, cols, cols < vocab, logit_scale, softcap, HAS_BIAS, HAS_CAP)
    u = tl.load(teacher_ptr + cols, mask=cols < vocab, other=float("-inf")).to(tl.float32)
    return z, u


@triton.jit
def _log_probs(z, u, m_z, m_u, log_q, log_p, inverse_q, inverse_p, LOGPROBS: tl.constexpr):
    """log q and log p; log-probabilities of a teacher are taken as they are."""
    a = (z - m_z) * inverse_q - log_q
    if LOGPROBS:
        b = u
    else:
        b = (u - m_u) * inverse_p - log_p
    return a, b


@triton.jit
def distill_dense_kernel(
    logits_ptr, teacher_ptr, bias_ptr, labels_ptr, scale_ptr, omega_ptr, stats_ptr, grad_ptr,
    vocab, logits_stride, teacher_stride, stats_stride, grad_stride, ignore_index,
    alpha, beta, rest_alpha, rest_beta, divergence_scale, inverse_q, inverse_p, label_smoothing, z_loss, softcap,
    logit_scale,
    DIVERGENCE: tl.constexpr, MIDDLE: tl.constexpr, LOGPROBS: tl.constexpr, TEMPERED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, WANT_GRAD: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    logits_ptr += row * logits_stride
    teacher_ptr += row * teacher_stride
    grad_ptr += row * grad_stride
    stats_ptr += row
    if label == ignore_index:
        clear_row(stats_ptr, stats_stride, grad_ptr, vocab, WANT_GRAD, BLOCK)
        return
    DECOUPLED: tl.constexpr = DIVERGENCE == "decoupled_kl"
    NORMALISED: tl.constexpr = DIVERGENCE == "zscored_mse" or DIVERGENCE == "cosine"
    CENTRED: tl.constexpr = DIVERGENCE == "zscored_mse" or DIVERGENCE == "centered_mse"
    OF_LOGITS: tl.constexpr = NORMALISED or CENTRED or DIVERGENCE == "mse"
    CROSS: tl.constexpr = DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl"
    # One step in a row that stays in registers: then the compiler drops the loops.
    if RESIDENT:
        stop: tl.constexpr = BLOCK
    else:
        stop = vocab
    lanes = tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + row)
    omega = tl.load(omega_ptr + row)
    z_y = student_logits(logits_ptr, bias_ptr, label, label >= 0, logit_scale, softcap, HAS_BIAS, HAS_CAP)
    u_y = tl.load(teacher_ptr + label).to(tl.float32)
    # Sums of the logits start from here, so that a large common part costs no digits.
    z_0 = tl.where(z_y > LOWEST, z_y, 0.0)
    u_0 = tl.where(u_y > LOWEST, u_y, 0.0)
    if RESIDENT:
        z_row, u_row = _load_pair(
            logits_ptr, teacher_ptr, bias_ptr, lanes, vocab, logit_scale, softcap, HAS_BIAS, HAS_CAP
        )

    m_z, m_u = tl.full([], LOWEST, tl.float32), tl.full([], LOWEST, tl.float32)
    s_1 = no_sum(RESIDENT, BLOCK)
    s_q, h_q, cross = s_1, s_1, s_1
    s_p, h_p = s_1, s_1
    sum_z, sum_u = s_1, s_1
    for start in range(0, stop, BLOCK):
        cols = start + lanes
        if RESIDENT:
            z, u = z_row, u_row
        else:
            z, u = _load_pair(logits_ptr, teacher_ptr, bias_ptr, cols, vocab, logit_scale, softcap, HAS_BIAS, HAS_CAP)
        sum_z += part(tl.where(cols < vocab, z - z_0, 0.0), RESIDENT)
        if CENTRED:
            sum_u += part(tl.where(cols < vocab, u - u_0, 0.0), RESIDENT)
        z = tl.where(cols == label, float("-inf"), z)
        u = tl.where(cols == label, float("-inf"), u)
        top_z, top_u = tl.maximum(m_z, tl.max(z, 0)), tl.maximum(m_u, tl.max(u, 0))
        by_z, by_u = (m_z - top_z) * inverse_q, (m_u - top_u) * inverse_p
        if TEMPERED:
            s_1 = s_1 * tl.exp(m_z - top_z) + part(tl.exp(z - top_z), RESIDENT)
        x, y = (z - top_z) * inverse_q, (u - top_u) * inverse_p
        e_q, e_p = tl.exp(x), tl.exp(y)
        if CROSS:
            cross = (cross + (by_z - by_u) * s_q) * tl.exp(by_z) + part(times(e_q, x - y), RESIDENT)
        s_q, h_q = shift(s_q, h_q, by_z)
        s_q, h_q = s_q + part(e_q, RESIDENT), h_q + part(times(e_q, x), RESIDENT)
        s_p, h_p = shift(s_p, h_p, by_u)
        s_p, h_p = s_p + part(e_p, RESIDENT), h_p + part(times(e_p, y), RESIDENT)
        m_z, m_u = top_z, top_u

    sum_z, sum_u = total(sum_z, RESIDENT), total(sum_u, RESIDENT)
    s_q, s_p = total(s_q, RESIDENT), total(s_p, RESIDENT)
    top_z, log_q, mean_q, miss_q = with_label(m_z, s_q, total(h_q, RESIDENT), z_y, inverse_q)
    top_u, log_p, mean_p, _ = with_label(m_u, s_p, total(h_p, RESIDENT), u_y, inverse_p)
    if TEMPERED:
        _, log_1, _, miss = with_label(m_z, total(s_1, RESIDENT), 0.0, z_y, 1.0)
    else:
        _, log_1, _, miss = with_label(m_z, s_q, 0.0, z_y, 1.0)
    mass = 1.0
    entropy_p = log_p - mean_p
    if LOGPROBS:
        mass = tl.exp(top_u + log_p)
        entropy_p = -mass * (mean_p + top_u)

    # W, or what the logits are divided by and how far d lies along e.
    weight, along = 0.0, 0.0
    centre_z, centre_u, factor_z, factor_u = 0.0, 0.0, 1.0, 1.0
    pull, binary = 0.0, 0.0
    log_q_rest, log_p_rest = log_q, log_p
    if CENTRED:
        centre_z, centre_u = z_0 + sum_z / vocab, u_0 + sum_u / vocab
    if DECOUPLED:
        log_q_rest, log_p_rest = tl.log(s_q), tl.log(s_p)
        binary, pull = binary_kl((u_y - m_u) * inverse_p - log_p_rest, (z_y - m_z) * inverse_q - log_q_rest)
        binary, pull = alpha * binary, alpha * pull
    elif CROSS:
        by_z, by_u = (m_z - top_z) * inverse_q, (m_u - top_u) * inverse_p
        x_y, y_y = (z_y - top_z) * inverse_q, (u_y - top_u) * inverse_p
        cross = (total(cross, RESIDENT) + (by_z - by_u) * s_q) * tl.exp(by_z - log_q)
        cross += times(tl.exp(x_y - log_q), x_y - y_y) - log_q
        cross += -top_u if LOGPROBS else log_p
        weight = sum_of_weights(DIVERGENCE, mass, cross, beta, rest_beta)
    elif not MIDDLE:
        weight = sum_of_weights(DIVERGENCE, mass, 0.0, beta, rest_beta)
    if MIDDLE:
        first = no_sum(RESIDENT, BLOCK)
        second, third = first, first
        for start in range(0, stop, BLOCK):
            cols = start + lanes
            if RESIDENT:
                z, u = z_row, u_row
            else:
                z, u = _load_pair(
                    logits_ptr, teacher_ptr, bias_ptr, cols, vocab, logit_scale, softcap, HAS_BIAS, HAS_CAP
                )
            if NORMALISED:
                d, e = tl.where(cols < vocab, z - centre_z, 0.0), tl.where(cols < vocab, u - centre_u, 0.0)
                first, second = first + part(d * d, RESIDENT), second + part(e * e, RESIDENT)
                third += part(d * e, RESIDENT)
            else:
                a, b = _log_probs(z, u, top_z, top_u, log_q, log_p, inverse_q, inverse_p, LOGPROBS)
                _, w, _ = terms(DIVERGENCE, tl.exp(b), tl.exp(a), b, a, alpha, beta, rest_alpha, rest_beta)
                first += part(w, RESIDENT)
        if NORMALISED:
            count = vocab if DIVERGENCE == "zscored_mse" else 1.0
            square_z, square_u = total(first, RESIDENT) / count, total(second, RESIDENT) / count
            factor_z = tl.where(square_z == 0.0, 0.0, tl.rsqrt(square_z))
            factor_u = tl.where(square_u == 0.0, 0.0, tl.rsqrt(square_u))
            along = 1.0 - total(third, RESIDENT) / count * factor_z * factor_u
        else:
            weight = total(first, RESIDENT)

    # D = share sum (d - e)^2 of the losses between logits.
    share = 0.5 if DIVERGENCE == "cosine" else 1.0 / vocab
    hard = scale * (1.0 - omega)
    soft = scale * omega * divergence_scale * inverse_q
    lse = top_z + log_1
    zed = scale * 2.0 * z_loss * lse
    smooth = hard * label_smoothing / vocab
    # The slopes of a softmax sum to zero: that of a likely label is in those of the others, where nothing cancels.
    by_others = (miss_q < 0.5) & (not OF_LOGITS)
    value = no_sum(RESIDENT, BLOCK)
    slopes, both = value, value
    for start in range(0, stop, BLOCK):
        cols = start + lanes
        if RESIDENT:
            z, u = z_row, u_row
        else:
            z, u = _load_pair(logits_ptr, teacher_ptr, bias_ptr, cols, vocab, logit_scale, softcap, HAS_BIAS, HAS_CAP)
        both += part(tl.where((z >= top_z) & (u >= top_u), 1.0, 0.0), RESIDENT)
        if OF_LOGITS:
            d = tl.where(cols < vocab, (z - centre_z) * factor_z, 0.0)
            e = tl.where(cols < vocab, (u - centre_u) * factor_u, 0.0)
            value += part((d - e) * (d - e), RESIDENT)
            slope = 2.0 * share * factor_z * (d - e - along * d)
        elif DECOUPLED:
            a, b = _log_probs(z, u, m_z, m_u, log_q_rest, log_p_rest, inverse_q, inverse_p, False)
            q, p = tl.exp(a), tl.exp(b)
            slope = beta * (q - p) - q * pull
            value += part(tl.where(cols == label, 0.0, beta * kl_terms(p, q, log_ratio(b, a))), RESIDENT)
            slope = tl.where(cols == label, pull, slope)
        else:
            a, b = _log_probs(z, u, top_z, top_u, log_q, log_p, inverse_q, inverse_p, LOGPROBS)
            q, p = tl.exp(a), tl.exp(b)
            each, w, excess = terms(DIVERGENCE, p, q, b, a, alpha, beta, rest_alpha, rest_beta)
            if LOGPROBS:
                each += excess * (p - q)
            value += part(each, RESIDENT)
            slope = w - q * weight
        slopes += part(tl.where((cols == label) != by_others, slope, 0.0), RESIDENT)
        if WANT_GRAD:
            g = (hard + zed) * tl.exp((z - top_z) - log_1) - smooth
            g -= tl.where(cols == label, hard * (1.0 - label_smoothing), 0.0)
            g += tl.where(omega > 0.0, soft * slope, 0.0)
            g = raw_grad(g, z, scale, logit_scale, softcap, HAS_CAP)
            tl.store(grad_ptr + cols, g.to(grad_ptr.dtype.element_ty), mask=cols < vocab)

    divergence = total(value, RESIDENT) + binary
    slope_y = tl.where(by_others, -total(slopes, RESIDENT), total(slopes, RESIDENT))
    if OF_LOGITS:
        divergence *= share
    if DIVERGENCE == "cosine":
        divergence = tl.where((factor_z == 0.0) | (factor_u == 0.0), 1.0, divergence)
    if LOGPROBS:
        teacher_y = u_y
    else:
        teacher_y = (u_y - top_u) * inverse_p - log_p
    store_stats(
        stats_ptr, stats_stride, omega, label_smoothing, z_loss, (top_z - z_y) + log_1,
        (top_z - z_0) + log_1 - sum_z / vocab, divergence_scale * divergence, lse, top_u * inverse_p + log_p,
        (z_y - top_z) * inverse_q - log_q, teacher_y, log_q - mean_q, entropy_p, z_y >= top_z, u_y >= top_u,
        gradient_ratio(slope_y * divergence_scale * inverse_q, miss, omega), total(both, RESIDENT) > 0.0,
    )  # fmt: skip
