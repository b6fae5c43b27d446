"""The Triton row pass without a teacher and with a sparse one: one program per row, two passes over it.

A tail bucket takes a third where the student's mass is on the kept entries for the most part.

The gradient of a sparse divergence is c q + b for the whole row, a correction at the K kept entries, and one at the
label (sparse.py has the mathematics). c, b and the corrections follow from K gathered logits and the statistics.
"""

import triton
import triton.language as tl

from effkern.ops.distill.triton_common import (
    LOWEST,
    clear_row,
    gradient_ratio,
    no_sum,
    part,
    raw_grad,
    shift,
    store_stats,
    student_logits,
    times,
    total,
    with_label,
    xlogx,
)


@triton.jit
def _load_kept(
    logits_ptr, ids_ptr, logprobs_ptr, bias_ptr, slots, num_kept, vocab, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Ids (-1 in an empty slot), and logits of the student and log-probabilities there (-inf in an empty slot)."""
    ids = tl.load(ids_ptr + slots, mask=slots < num_kept, other=-1).to(tl.int64)
    filled = (ids >= 0) & (ids < vocab)
    z = student_logits(logits_ptr, bias_ptr, ids, filled, logit_scale, softcap, HAS_BIAS, HAS_CAP)
    raw_t = tl.load(logprobs_ptr + slots, mask=filled, other=float("-inf")).to(tl.float32)
    return tl.where(filled, ids, -1), z, raw_t


@triton.jit
def _log_sum_exp(x):
    top = tl.maximum(tl.max(x, 0), LOWEST)
    return top + tl.log(tl.sum(tl.exp(x - top), 0))


@triton.jit
def _sum_outside(
    logits_ptr, bias_ptr, ids, vocab, top_z, log_q, inverse_q, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of q over what is not kept: one minus a large kept sum would cancel.

    The kept logits are NaN in the meantime, so that it is one more pass over the row, however many they are.
    """
    kept = tl.load(logits_ptr + ids, mask=ids >= 0, other=0.0)
    tl.debug_barrier()
    tl.store(logits_ptr + ids, float("nan"), mask=ids >= 0)
    tl.debug_barrier()
    # Beside a row in registers there is room for little else.
    STEP: tl.constexpr = min(BLOCK, 1024)
    outside = tl.zeros([STEP], tl.float32)
    for start in range(0, vocab, STEP):
        cols = start + tl.arange(0, STEP)
        z = student_logits(logits_ptr, bias_ptr, cols, cols < vocab, logit_scale, softcap, HAS_BIAS, HAS_CAP)
        outside += tl.where(z == z, tl.exp((z - top_z) * inverse_q - log_q), 0.0)
    tl.debug_barrier()
    tl.store(logits_ptr + ids, kept, mask=ids >= 0)
    tl.debug_barrier()
    return tl.sum(outside, 0)


@triton.jit
def _slots_of(ids_ptr, ids, num_kept, KEPT: tl.constexpr, CHUNK: tl.constexpr):
    """In how many slots each of `ids` stands."""
    count = tl.zeros([KEPT], tl.float32)
    for start in range(0, num_kept, CHUNK):
        slots = start + tl.arange(0, CHUNK)
        others = tl.load(ids_ptr + slots, mask=slots < num_kept, other=-1).to(tl.int64)
        count += tl.sum(tl.where(ids[:, None] == others[None, :], 1.0, 0.0), 1)
    return count


@triton.jit
def _correction(REVERSE: tl.constexpr, ids, log_q, log_t, gain, away, extra):
    """What a kept entry adds to its share of q and to b: gain q e^-away - t + extra, and in the reverse KL q r."""
    if REVERSE:
        delta = times(tl.exp(log_q), log_q - log_t)
    else:
        delta = gain * tl.exp(log_q - away) - tl.exp(log_t) + extra
    return tl.where(ids >= 0, delta, 0.0)


@triton.jit
def _dense_grad(
    z, is_label, top_z, log_1, log_q, inverse_q, of_q1, of_q, of_all, of_label, added, scale, logit_scale, softcap,
    TEMPERED: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The gradient of any entry; `added` is the correction of a kept one."""
    if TEMPERED:
        g = of_q1 * tl.exp((z - top_z) - log_1) + of_q * tl.exp((z - top_z) * inverse_q - log_q)
    else:
        g = (of_q1 + of_q) * tl.exp((z - top_z) - log_1)
    g += added - of_all - tl.where(is_label, of_label, 0.0)
    return raw_grad(g, z, scale, logit_scale, softcap, HAS_CAP)


@triton.jit
def distill_sparse_kernel(
    logits_ptr, ids_ptr, logprobs_ptr, bias_ptr, labels_ptr, scale_ptr, omega_ptr, stats_ptr, grad_ptr,
    vocab, num_kept, logits_stride, stats_stride, grad_stride, ignore_index,
    divergence_scale, inverse_q, inverse_p, tail_floor, label_smoothing, z_loss, softcap, logit_scale,
    KIND: tl.constexpr, REVERSE: tl.constexpr, TEMPERED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    WANT_GRAD: tl.constexpr, RESIDENT: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    stats_ptr += row
    if label == ignore_index:
        clear_row(stats_ptr, stats_stride, grad_ptr, vocab, WANT_GRAD, BLOCK)
        return
    TEACHER: tl.constexpr = KIND != "none"
    NORMALISE: tl.constexpr = KIND == "renormalized" or KIND == "both_renormalized"
    # One step in a row that stays in registers: then the compiler drops the loops.
    if RESIDENT:
        stop: tl.constexpr = BLOCK
    else:
        stop = vocab
    lanes = tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + row)
    omega = tl.load(omega_ptr + row)
    z_y = student_logits(logits_ptr, bias_ptr, label, label >= 0, logit_scale, softcap, HAS_BIAS, HAS_CAP)
    # The sum of the logits starts from here, so that a large common part costs no digits.
    z_0 = tl.where(z_y > LOWEST, z_y, 0.0)
    if TEACHER:
        ids_ptr += row * num_kept
        logprobs_ptr += row * num_kept
        ids, z_k, log_t = _load_kept(
            logits_ptr, ids_ptr, logprobs_ptr, bias_ptr, tl.arange(0, KEPT), num_kept, vocab, logit_scale, softcap,
            HAS_BIAS, HAS_CAP,
        )  # fmt: skip
        # In double, of K entries alone, and before a row takes the registers: the logarithm of a tail shows what is
        # lost here.
        over = (1.0 - tl.sum(tl.exp(log_t.to(tl.float64)), 0)).to(tl.float32)
    if RESIDENT:
        z_row = student_logits(logits_ptr, bias_ptr, lanes, lanes < vocab, logit_scale, softcap, HAS_BIAS, HAS_CAP)

    m_z = tl.full([], LOWEST, tl.float32)
    s_1 = no_sum(RESIDENT, BLOCK)
    s_q, h_q, sum_z = s_1, s_1, s_1
    for start in range(0, stop, BLOCK):
        cols = start + lanes
        if RESIDENT:
            z = z_row
        else:
            z = student_logits(logits_ptr, bias_ptr, cols, cols < vocab, logit_scale, softcap, HAS_BIAS, HAS_CAP)
        sum_z += part(tl.where(cols < vocab, z - z_0, 0.0), RESIDENT)
        z = tl.where(cols == label, float("-inf"), z)
        top_z = tl.maximum(m_z, tl.max(z, 0))
        if TEMPERED:
            s_1 = s_1 * tl.exp(m_z - top_z) + part(tl.exp(z - top_z), RESIDENT)
        x = (z - top_z) * inverse_q
        e_q = tl.exp(x)
        s_q, h_q = shift(s_q, h_q, (m_z - top_z) * inverse_q)
        s_q, h_q = s_q + part(e_q, RESIDENT), h_q + part(times(e_q, x), RESIDENT)
        m_z = top_z

    sum_z, s_q = total(sum_z, RESIDENT), total(s_q, RESIDENT)
    top_z, log_q, mean_q, miss_q = with_label(m_z, s_q, total(h_q, RESIDENT), z_y, inverse_q)
    if TEMPERED:
        _, log_1, _, miss = with_label(m_z, total(s_1, RESIDENT), 0.0, z_y, 1.0)
    else:
        _, log_1, _, miss = with_label(m_z, s_q, 0.0, z_y, 1.0)
    log_q_y = (z_y - top_z) * inverse_q - log_q

    # c, b, and the correction at the label.
    factor, constant, at_label = 0.0, 0.0, 0.0
    divergence, teacher_lse, teacher_y, teacher_entropy, slope_y = 0.0, 0.0, 0.0, 0.0, 0.0
    teacher_hit, agreement = False, False
    if TEACHER:
        filled = ids >= 0
        log_q_k = (z_k - top_z) * inverse_q - log_q
        teacher_lse = _log_sum_exp(log_t)
        temper, log_mass = 1.0, 0.0
        if NORMALISE:
            temper = inverse_p
            log_mass = _log_sum_exp(log_t * temper)
            log_mass = tl.where(log_mass > LOWEST, log_mass, 0.0)
        log_t = log_t * temper - log_mass
        t, q_k = tl.exp(log_t), tl.exp(log_q_k)
        mass, mass_q = tl.sum(t, 0), tl.sum(q_k, 0)
        tail = tl.maximum(over, 0.0)
        t_y = tl.sum(tl.where(ids == label, t, 0.0), 0)
        others = vocab - tl.sum(filled.to(tl.int32), 0)
        divergence = tl.sum(times(t, log_t - log_q_k), 0)
        teacher_entropy = -tl.sum(xlogx(t), 0)
        teacher_y = _log_sum_exp(tl.where(ids == label, log_t, float("-inf")))
        factor = mass
        gain, away, extra = 0.0, 0.0, 0.0
        if KIND == "tail_bucket":
            slots = _slots_of(ids_ptr, ids, num_kept, KEPT, CHUNK)
            outside = 1.0 - mass_q
            if mass_q > 0.5:
                outside = _sum_outside(
                    logits_ptr, bias_ptr, ids, vocab, top_z, log_q, inverse_q, logit_scale, softcap, HAS_BIAS,
                    HAS_CAP, BLOCK,
                )  # fmt: skip
                # An id that stands twice counts twice among the kept ones.
                outside -= tl.sum(tl.where(slots > 1.0, q_k * (1.0 - 1.0 / slots), 0.0), 0)
            tail_q = tl.where(outside < tail_floor, tail_floor, outside)
            floored = tl.maximum(tail, tail_floor)
            # An entry that stands in n slots has the slope (once + (n - 1) again) q and its corrections; `factor` is
            # that of n = 0. Were each slot to add its `again` to `factor`, they would cancel where the student is sure.
            if REVERSE:
                again = tl.log(floored / tail_q)
                divergence = tl.sum(times(q_k, log_q_k - log_t), 0) - tail_q * again
                once, excess = -divergence, 0.0
            else:
                again = floored / tail_q
                divergence += floored * tl.log(again)
                once, excess = 1.0, over - floored
            factor = once - again
            teacher_entropy -= xlogx(tail)
        elif KIND == "both_renormalized":
            some = others < vocab
            away = tl.where(some, _log_sum_exp(log_q_k), 0.0)
            gain = mass
            divergence += times(mass, away)
            factor = 0.0
        elif KIND == "tail_to_label":
            divergence += xlogx(t_y + tail) - xlogx(t_y) - times(tail, log_q_y)
            factor = mass + tail
            at_label = -tail
            teacher_entropy += xlogx(t_y) - xlogx(t_y + tail)
            teacher_y = tl.log(t_y + tail)
        elif KIND == "uniform_tail":
            each = tl.where(others > 0, tail / tl.maximum(others, 1), 0.0)
            rest = (sum_z + (z_0 - top_z) * vocab) * inverse_q - log_q * vocab
            rest -= tl.sum(tl.where(filled, log_q_k, 0.0), 0)
            divergence += xlogx(each) * others - times(each, rest)
            factor, constant, extra = mass + each * others, -each, each
            teacher_entropy -= others * xlogx(each)
            kept_label = tl.sum(tl.where(ids == label, 1, 0), 0) > 0
            teacher_y = tl.where(kept_label, teacher_y, tl.log(tail / tl.maximum(others, 1)))
        largest = filled & (t >= tl.max(t, 0)) & (t > 0.0)
        teacher_hit = tl.sum(tl.where(largest & (ids == label), 1, 0), 0) > 0
        agreement = tl.sum(tl.where(largest & (z_k >= top_z), 1, 0), 0) > 0
        # The slopes sum to zero: that of a likely label is in those of the others, where nothing cancels.
        by_others = miss_q < 0.5
        delta = _correction(REVERSE, ids, log_q_k, log_t, gain, away, extra)
        delta = tl.sum(tl.where((ids == label) != by_others, delta, 0.0), 0)
        if KIND == "tail_bucket":
            n_y, q_y = tl.sum(tl.where(ids == label, 1.0, 0.0), 0), tl.exp(log_q_y)
            further = (n_y - 1.0) * q_y
            # What is neither kept nor the label. A floor or a mass above 1 leaves an excess.
            rest = tl.where(n_y > 0.0, tail_q + further, miss_q - mass_q)
            slope_others = excess - once * miss_q - delta + again * rest
            slope_y = once * q_y + again * further + delta
        else:
            slope_others = -(factor * miss_q + constant * (vocab - 1) + delta)
            slope_y = factor * tl.exp(log_q_y) + constant + at_label + delta
        slope_y = tl.where(by_others, slope_others, slope_y)

    lse = top_z + log_1
    if WANT_GRAD:
        hard = scale * (1.0 - omega)
        of_q1 = hard + scale * 2.0 * z_loss * lse
        of_all = hard * label_smoothing / vocab
        of_label = hard * (1.0 - label_smoothing)
        of_q = 0.0
        if TEACHER:
            soft = scale * omega * divergence_scale * inverse_q
            of_q = tl.where(omega > 0.0, soft * factor, 0.0)
            of_all -= soft * constant
            of_label -= soft * at_label
            # Corrections of an id that stands in several slots add up: each slot looks for its equals, so that all
            # of them hold the entry's final gradient and it does not matter which is stored last.
            if KIND == "tail_bucket":
                added, of_kept_q = (once + (slots - 1.0) * again) * q_k, 0.0
            else:
                added, of_kept_q = tl.zeros([KEPT], tl.float32), of_q
            for start in range(0, num_kept, CHUNK):
                same_ids, same_z, same_t = _load_kept(
                    logits_ptr, ids_ptr, logprobs_ptr, bias_ptr, start + tl.arange(0, CHUNK), num_kept, vocab,
                    logit_scale, softcap, HAS_BIAS, HAS_CAP,
                )  # fmt: skip
                same_q = (same_z - top_z) * inverse_q - log_q
                same = _correction(REVERSE, same_ids, same_q, same_t * temper - log_mass, gain, away, extra)
                added += tl.sum(tl.where(ids[:, None] == same_ids[None, :], same[None, :], 0.0), 1)
            added = tl.where(omega > 0.0, soft * added, 0.0)
            # The gradient may overwrite the logits that were gathered.
            tl.debug_barrier()
        for start in range(0, stop, BLOCK):
            cols = start + lanes
            if RESIDENT:
                z = z_row
            else:
                z = student_logits(logits_ptr, bias_ptr, cols, cols < vocab, logit_scale, softcap, HAS_BIAS, HAS_CAP)
            g = _dense_grad(
                z, cols == label, top_z, log_1, log_q, inverse_q, of_q1, of_q, of_all, of_label, 0.0, scale,
                logit_scale, softcap, TEMPERED, HAS_CAP,
            )  # fmt: skip
            tl.store(grad_ptr + cols, g.to(grad_ptr.dtype.element_ty), mask=cols < vocab)
        if TEACHER:
            # Behind the barrier the row is complete, and its kept entries are stored once more, not added to.
            tl.debug_barrier()
            g = _dense_grad(
                z_k, ids == label, top_z, log_1, log_q, inverse_q, of_q1, of_kept_q, of_all, of_label, added, scale,
                logit_scale, softcap, TEMPERED, HAS_CAP,
            )  # fmt: skip
            tl.store(grad_ptr + ids, g.to(grad_ptr.dtype.element_ty), mask=ids >= 0)

    mean_ce = (top_z - z_0) + log_1 - sum_z / vocab
    ratio = gradient_ratio(slope_y * divergence_scale * inverse_q, miss, omega)
    store_stats(
        stats_ptr, stats_stride, omega, label_smoothing, z_loss, (top_z - z_y) + log_1, mean_ce,
        divergence_scale * divergence, lse, teacher_lse, log_q_y, teacher_y, log_q - mean_q, teacher_entropy,
        z_y >= top_z, teacher_hit, ratio, agreement,
    )  # fmt: skip
