"""What both Triton row passes are made of: logits from memory, series near zero, and one step of a softmax.

Tiles are float32. An entry beyond the vocabulary is -inf in both models, like a masked one: it has no probability and
adds nothing to any sum over probabilities.
"""

import triton
import triton.language as tl

# Below every logit but -inf, so that a difference to a running maximum is never inf - inf.
LOWEST = tl.constexpr(-1.0e30)
# 2^-53: a label whose share is 1 in double precision, the oracle's, has no gradient ratio.
SURE = tl.constexpr(1.1102230246251565e-16)
NUM_STATS = tl.constexpr(13)


@triton.jit
def student_logits(
    logits_ptr, bias_ptr, cols, mask, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
):
    """z = c tanh(k (raw + bias) / c), -inf where `mask` is false."""
    z = tl.load(logits_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    z *= logit_scale
    if HAS_CAP:
        # tanh(x) = 2 sigmoid(2x) - 1
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return tl.where(mask, z, float("-inf"))


@triton.jit
def raw_grad(g, z, scale, logit_scale, softcap, HAS_CAP: tl.constexpr):
    """From d loss / dz to d loss / d(raw); 0 in a row of weight 0, whatever it holds."""
    if HAS_CAP:
        g *= 1.0 - (z / softcap) * (z / softcap)
    return tl.where(scale != 0.0, g * logit_scale, 0.0)


@triton.jit
def clear_row(stats_ptr, stats_stride, grad_ptr, vocab, WANT_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """An ignored row: exact zeros, and nothing of it is read."""
    for s in tl.static_range(NUM_STATS):
        tl.store(stats_ptr + s * stats_stride, 0.0)
    if WANT_GRAD:
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(grad_ptr + cols, tl.zeros([BLOCK], dtype=grad_ptr.dtype.element_ty), mask=cols < vocab)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1: near zero 2 atanh(x / (2 + x)) by its series."""
    t = x / (2.0 + x)
    square = t * t
    s = 0.0769230769 * square + 0.0909090909
    s = s * square + 0.111111111
    s = s * square + 0.142857143
    s = s * square + 0.2
    s = s * square + 0.333333333
    near = 2.0 * t * (s * square + 1.0)
    return tl.where((x > -0.5) & (x < 0.5), near, tl.log(1.0 + x))


@triton.jit
def expm1(x):
    """exp(x) - 1, near zero by its series."""
    s = 2.48015873e-5 * x + 1.98412698e-4
    s = s * x + 1.38888889e-3
    s = s * x + 8.33333333e-3
    s = s * x + 4.16666667e-2
    s = s * x + 0.166666667
    s = s * x + 0.5
    return tl.where((x > -0.5) & (x < 0.5), x * (s * x + 1.0), tl.exp(x) - 1.0)


@triton.jit
def log_ratio(over, under):
    """over - under of two logarithms, 0 where both are -inf."""
    return tl.where((over == float("-inf")) & (under == float("-inf")), 0.0, over - under)


@triton.jit
def kl_terms(p, q, x):
    """Terms of sum p x + q - p with x = log p - log q: each >= 0, so that nothing cancels where p and q agree."""
    # p (x + expm1(-x)) by its series, which starts at x^2 / 2.
    s = 2.48015873e-5 * x - 1.98412698e-4
    s = s * x + 1.38888889e-3
    s = s * x - 8.33333333e-3
    s = s * x + 4.16666667e-2
    s = s * x - 0.166666667
    s = s * x + 0.5
    far = times(p, x) + (q - p)
    return tl.where((p > 0.0) & (x < 0.5) & (x > -0.5), p * x * x * s, far)


@triton.jit
def xlogx(x):
    """x log x, with 0 log 0 = 0."""
    return x * tl.log(tl.where(x == 0.0, 1.0, x))


@triton.jit
def times(mass, factor):
    """mass * factor, 0 where there is no mass, whatever the factor; a mass of NaN is not none."""
    return tl.where(mass == 0.0, 0.0, mass * factor)


# Sums over a row are kept per lane, and those of a row that is one block become scalars at once: as tiles, eight of
# them would not fit beside it.


@triton.jit
def no_sum(RESIDENT: tl.constexpr, BLOCK: tl.constexpr):
    return tl.full([], 0.0, tl.float32) if RESIDENT else tl.zeros([BLOCK], tl.float32)


@triton.jit
def part(x, RESIDENT: tl.constexpr):
    return tl.sum(x, 0) if RESIDENT else x


@triton.jit
def total(x, RESIDENT: tl.constexpr):
    return x if RESIDENT else tl.sum(x, 0)


# A softmax is kept as its maximum m, s = sum e^x and h = sum x e^x with x = (z - m) / T. The label stays out of all
# three and joins at the end: so 1 - q_y and log q_y keep their digits where q_y is almost 1.


@triton.jit
def shift(s, h, by):
    """s and h after the maximum has grown by -`by`."""
    grown = tl.exp(by)
    return s * grown, (h + by * s) * grown


@triton.jit
def with_label(m, s, h, z_y, inverse):
    """Maximum, log of the sum, mean of x, and 1 - q_y, of a softmax that the label has joined."""
    top = tl.maximum(m, z_y)
    rest, h = shift(s, h, (m - top) * inverse)
    x_y = (z_y - top) * inverse
    e_y = tl.exp(x_y)
    full = rest + e_y
    log_sum = tl.where(z_y >= m, log1p(rest), tl.log(full))
    return top, log_sum, (h + times(e_y, x_y)) / full, rest / full


@triton.jit
def gradient_ratio(slope_y, miss, omega):
    """(1 - omega) + omega (dD / dz_y) / (q_y - 1), miss = 1 - q_y at temperature 1."""
    ratio = tl.where(miss > SURE, -slope_y / tl.where(miss > SURE, miss, 1.0), 0.0)
    return (1.0 - omega) + tl.where(omega > 0.0, omega * ratio, 0.0)


@triton.jit
def store_stats(
    stats_ptr, stats_stride, omega, label_smoothing, z_loss, ce, mean_ce, divergence, lse, teacher_lse,
    label_logprob, teacher_label_logprob, entropy, teacher_entropy, hit, teacher_hit, ratio, agreement,
):  # fmt: skip
    """The loss from its parts, and all columns in the order of DistillStats; mean_ce = lse - mean z."""
    hard = ce
    if label_smoothing > 0.0:
        hard = (1.0 - label_smoothing) * ce + label_smoothing * mean_ce
    # A weight of zero switches a term off, even where it is infinite.
    loss = tl.where(omega < 1.0, (1.0 - omega) * hard, 0.0) + tl.where(omega > 0.0, omega * divergence, 0.0)
    loss += tl.where(z_loss > 0.0, z_loss * lse * lse, 0.0)
    tl.store(stats_ptr, loss)
    tl.store(stats_ptr + stats_stride, ce)
    tl.store(stats_ptr + 2 * stats_stride, divergence)
    tl.store(stats_ptr + 3 * stats_stride, lse)
    tl.store(stats_ptr + 4 * stats_stride, teacher_lse)
    tl.store(stats_ptr + 5 * stats_stride, label_logprob)
    tl.store(stats_ptr + 6 * stats_stride, teacher_label_logprob)
    tl.store(stats_ptr + 7 * stats_stride, entropy)
    tl.store(stats_ptr + 8 * stats_stride, teacher_entropy)
    tl.store(stats_ptr + 9 * stats_stride, tl.where(hit & (lse == lse), 1.0, 0.0))
    tl.store(stats_ptr + 10 * stats_stride, tl.where(teacher_hit, 1.0, 0.0))
    tl.store(stats_ptr + 11 * stats_stride, ratio)
    tl.store(stats_ptr + 12 * stats_stride, tl.where(agreement, 1.0, 0.0))
