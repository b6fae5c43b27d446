"""The Triton row pass: one program per row, two passes over the row.

The first pass keeps an online maximum and sum for each softmax; the second turns the logits into values and
gradients. All arithmetic is float32. The gradient goes to a buffer of its own in the type of the matrix products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern.ops.distill.rows import DIVERGENCES, RowOptions, Rows

# (vocabulary up to, columns per step, warps): one step for small rows; beyond, two 16-byte loads per thread.
# Chosen by registers (tests/native/triton_resources.json); not yet timed on a GPU.
LAUNCH = [(1024, 1024, 8), (1 << 31, 2048, 8)]

# Left alone, the assembler aims at 48 or 80 registers and spills a few scalars to get there.
MAX_REGISTERS = 96


@triton.jit
def _finish(raw, bias_ptr, cols, mask, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """z = c tanh(k (raw + bias) / c)."""
    if HAS_BIAS:
        raw += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    z = raw * logit_scale
    if HAS_CAP:
        # tanh(x) = 2 sigmoid(2x) - 1
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def _online(m, s, x, mask):
    """One step of an online softmax; x is already divided by the temperature, masked entries are skipped."""
    # The running maximum stays above -inf, so that a step of -inf adds exp(-inf) = 0 and not exp(nan).
    new = tl.maximum(m, tl.max(tl.where(mask, x, -3.0e38), 0))
    s = s * tl.exp(m - new) + tl.sum(tl.where(mask, tl.exp(x - new), 0.0), 0)
    return new, s


@triton.jit
def _forward_kl_value(p, q, x):
    """Terms of sum p x + q - p, x = log p - log q, without cancellation where p and q agree."""
    s = 2.48015873e-5 * x - 1.98412698e-4
    s = s * x + 1.38888889e-3
    s = s * x - 8.33333333e-3
    s = s * x + 4.16666667e-2
    s = s * x - 1.66666667e-1
    s = s * x + 0.5
    far = tl.where(p > 0.0, p * x, 0.0) + (q - p)
    return tl.where((x < 0.5) & (x > -0.5), p * x * x * s, far)


@triton.jit
def distill_rows_kernel(
    logits_ptr, teacher_ptr, bias_ptr, labels_ptr, scale_ptr, omega_ptr, stats_ptr, grad_ptr,
    vocab, logits_stride, teacher_stride, stats_stride, grad_stride, ignore_index,
    inverse_q, inverse_p, label_smoothing, z_loss, softcap, logit_scale,
    HAS_TEACHER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TEMPERED: tl.constexpr,
    WANT_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    stats_ptr += row
    if HAS_TEACHER:
        teacher_ptr += row * teacher_stride
    if label == ignore_index:
        for s in tl.static_range(11):
            tl.store(stats_ptr + s * stats_stride, 0.0)
        if WANT_GRAD:
            for start in range(0, vocab, BLOCK):
                cols = start + lanes
                tl.store(grad_ptr + cols, tl.zeros([BLOCK], dtype=grad_ptr.dtype.element_ty), mask=cols < vocab)
    else:
        scale = tl.load(scale_ptr + row)
        omega = tl.load(omega_ptr + row)

        m_q, s_q, m_1, s_1, m_p, s_p = -3.0e38, 0.0, -3.0e38, 0.0, -3.0e38, 0.0
        sum_z = 0.0
        for start in range(0, vocab, BLOCK):
            cols = start + lanes
            mask = cols < vocab
            raw = tl.load(logits_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            z = _finish(raw, bias_ptr, cols, mask, logit_scale, softcap, HAS_BIAS, HAS_CAP)
            m_1, s_1 = _online(m_1, s_1, z, mask)
            if TEMPERED:
                m_q, s_q = _online(m_q, s_q, z * inverse_q, mask)
            sum_z += tl.sum(tl.where(mask, z, 0.0), 0)
            if HAS_TEACHER:
                u = tl.load(teacher_ptr + cols, mask=mask, other=0.0).to(tl.float32) * inverse_p
                m_p, s_p = _online(m_p, s_p, u, mask)
        log_1 = tl.log(s_1)
        lse = m_1 + log_1
        if TEMPERED:
            log_q = tl.log(s_q)
        else:
            m_q, log_q = m_1, log_1
        log_p = tl.log(s_p)

        raw_y = tl.load(logits_ptr + label).to(tl.float32)
        z_y = _finish(raw_y, bias_ptr, label, True, logit_scale, softcap, HAS_BIAS, HAS_CAP)
        ce = (m_1 - z_y) + log_1
        hard = scale * (1.0 - omega)
        soft = scale * omega * inverse_q
        zed = scale * 2.0 * z_loss * lse
        smooth = hard * label_smoothing / vocab

        divergence, entropy_q, entropy_p = 0.0, 0.0, 0.0
        for start in range(0, vocab, BLOCK):
            cols = start + lanes
            mask = cols < vocab
            raw = tl.load(logits_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            z = _finish(raw, bias_ptr, cols, mask, logit_scale, softcap, HAS_BIAS, HAS_CAP)
            a = (z * inverse_q - m_q) - log_q
            q = tl.where(mask, tl.exp(a), 0.0)
            entropy_q -= tl.sum(tl.where(q > 0.0, q * a, 0.0), 0)
            q1 = q
            if TEMPERED:
                q1 = tl.where(mask, tl.exp((z - m_1) - log_1), 0.0)
            g = (hard + zed) * q1 - smooth - tl.where(cols == label, hard * (1.0 - label_smoothing), 0.0)
            if HAS_TEACHER:
                u = tl.load(teacher_ptr + cols, mask=mask, other=0.0).to(tl.float32) * inverse_p
                b = (u - m_p) - log_p
                p = tl.where(mask, tl.exp(b), 0.0)
                entropy_p -= tl.sum(tl.where(p > 0.0, p * b, 0.0), 0)
                divergence += tl.sum(tl.where(mask, _forward_kl_value(p, q, b - a), 0.0), 0)
                g += tl.where(omega > 0.0, soft * (q - p), 0.0)
            if WANT_GRAD:
                if HAS_CAP:
                    g *= 1.0 - (z / softcap) * (z / softcap)
                g *= logit_scale
                g = tl.where(scale != 0.0, g, 0.0)
                tl.store(grad_ptr + cols, g.to(grad_ptr.dtype.element_ty), mask=mask)

        smoothed = (1.0 - label_smoothing) * ce + label_smoothing * (lse - sum_z / vocab)
        hard_loss = tl.where(label_smoothing > 0.0, smoothed, ce)
        loss = tl.where(omega < 1.0, (1.0 - omega) * hard_loss, 0.0) + tl.where(omega > 0.0, omega * divergence, 0.0)
        loss += tl.where(z_loss > 0.0, z_loss * lse * lse, 0.0)
        # The order of DistillStats.
        tl.store(stats_ptr, loss)
        tl.store(stats_ptr + stats_stride, ce)
        tl.store(stats_ptr + 2 * stats_stride, divergence)
        tl.store(stats_ptr + 3 * stats_stride, lse)
        tl.store(stats_ptr + 5 * stats_stride, (z_y * inverse_q - m_q) - log_q)
        tl.store(stats_ptr + 7 * stats_stride, entropy_q)
        tl.store(stats_ptr + 9 * stats_stride, tl.where(z_y >= m_1, 1.0, 0.0))
        if HAS_TEACHER:
            u_y = tl.load(teacher_ptr + label).to(tl.float32) * inverse_p
            tl.store(stats_ptr + 4 * stats_stride, m_p + log_p)
            tl.store(stats_ptr + 6 * stats_stride, (u_y - m_p) - log_p)
            tl.store(stats_ptr + 8 * stats_stride, entropy_p)
            tl.store(stats_ptr + 10 * stats_stride, tl.where(u_y >= m_p, 1.0, 0.0))
        else:
            for s in tl.static_range(4, 11, 2):
                tl.store(stats_ptr + s * stats_stride, 0.0)


def triton_rows(rows: Rows, grad_dtype: torch.dtype | None, options: RowOptions) -> Tensor | None:
    """See `reference.reference_rows`. A float32 gradient replaces `logits_RV`; a narrower one gets a buffer."""
    assert options.divergence == DIVERGENCES[0]
    logits_RV, teacher_RV, bias_V, labels_R, scale_R, omega_R, stats_SR = rows
    num_rows, vocab = logits_RV.shape
    block, warps = next((b, w) for limit, b, w in LAUNCH if vocab <= limit)
    grad = logits_RV if grad_dtype in (None, logits_RV.dtype) else torch.empty_like(logits_RV, dtype=grad_dtype)
    teacher = logits_RV if teacher_RV is None else teacher_RV
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(logits_RV):
        distill_rows_kernel[(num_rows,)](
            logits_RV, teacher, logits_RV if bias_V is None else bias_V, labels_R, scale_R, omega_R, stats_SR, grad,
            vocab, logits_RV.stride(0), teacher.stride(0), stats_SR.stride(0), grad.stride(0), options.ignore_index,
            1.0 / options.temperature, 1.0 / options.teacher_temperature, options.label_smoothing, options.z_loss,
            options.softcap or 1.0, options.logit_scale,
            HAS_TEACHER=teacher_RV is not None, HAS_BIAS=bias_V is not None, HAS_CAP=options.softcap is not None,
            TEMPERED=options.temperature != 1.0, WANT_GRAD=grad_dtype is not None, BLOCK=block,
            num_warps=warps, maxnreg=MAX_REGISTERS, enable_fp_fusion=True,
        )  # fmt: skip
    return None if grad_dtype is None else grad


def _compile_case(block: int, warps: int, grad: str, **flags: bool) -> tuple:
    """What `tests.native.triton_codegen` compiles without a GPU: the launch of `triton_rows` with these flags."""
    on = {"HAS_TEACHER": True, "HAS_BIAS": False, "HAS_CAP": False, "TEMPERED": False, "WANT_GRAD": True, **flags}
    pointers = {
        "logits_ptr": "*fp32", "teacher_ptr": "*fp32", "bias_ptr": "*fp32", "labels_ptr": "*i64", "scale_ptr": "*fp32",
        "omega_ptr": "*fp32", "stats_ptr": "*fp32", "grad_ptr": grad,
    }  # fmt: skip
    strides = dict.fromkeys(("vocab", "logits_stride", "teacher_stride", "stats_stride", "grad_stride"), "i32:16")
    numbers = ("inverse_q", "inverse_p", "label_smoothing", "z_loss", "softcap", "logit_scale")
    signature = {**pointers, **strides, "ignore_index": "i32", **dict.fromkeys(numbers, "fp32")}
    return distill_rows_kernel, signature, {**on, "BLOCK": block}, {"num_warps": warps, "maxnreg": MAX_REGISTERS}


COMPILE_CASES = {
    "rows_kl_bf16": _compile_case(2048, 8, "*bf16"),
    "rows_kl_fp32": _compile_case(2048, 8, "*fp32"),
    "rows_kl_bf16_all": _compile_case(2048, 8, "*bf16", HAS_BIAS=True, HAS_CAP=True, TEMPERED=True),
    "rows_kl_bf16_small": _compile_case(1024, 8, "*bf16"),
    "rows_kl_eval": _compile_case(2048, 8, "*fp32", WANT_GRAD=False),
    "rows_hard_bf16": _compile_case(2048, 8, "*bf16", HAS_TEACHER=False),
}
