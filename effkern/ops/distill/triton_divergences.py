"""The divergences of a dense teacher in Triton: one formula each.

A divergence D(p, q) of two softmaxes depends on z through q alone, and dD / d(z / T) = w - q W with w = q dD/dq and
W = sum w. Its formula gives for a tile the terms of D, w, and the factor of sum p - sum q in D, which is zero unless
the teacher's mass is not 1. `terms` is the only place that a new one has to be added to (and `rows.DIVERGENCES`).
The mathematics is that of divergences.py; rest_alpha and rest_beta are 1 - alpha and 1 - beta, which would lose their
digits here where alpha or beta is almost 1.
"""

import triton
import triton.language as tl

from effkern.ops.distill.triton_common import expm1, kl_terms, log1p, log_ratio, times


@triton.jit
def _forward_kl(p, q, log_p, log_q):
    return kl_terms(p, q, log_ratio(log_p, log_q)), -p, 1.0


@triton.jit
def _reverse_kl(p, q, log_p, log_q):
    r = log_ratio(log_q, log_p)
    return kl_terms(q, p, r), times(q, r), -1.0


@triton.jit
def _mixture(p, q, log_p, log_q, share, rest):
    """m = share p + rest q, log(p / m), log(q / m); the logarithms from the term that makes up most of m."""
    gap = log_ratio(log_p, log_q)
    p_wins = gap > tl.log(rest / share)
    of_other, of_winner = tl.where(p_wins, rest, share), tl.where(p_wins, share, rest)
    away = tl.where(p_wins, -gap, gap)
    less = of_other * expm1(away)
    # Of a sum of positive terms where a tiny share would be lost beside 1. NaN stays in the other.
    above = tl.where(less < -0.5, tl.log(of_winner + of_other * tl.exp(away)), log1p(less))
    m = share * p + rest * q
    return m, tl.where(p_wins, -above, gap - above), tl.where(p_wins, -gap - above, -above)


@triton.jit
def _jsd(p, q, log_p, log_q, beta, rest):
    m, p_over_m, q_over_m = _mixture(p, q, log_p, log_q, beta, rest)
    value = beta * kl_terms(p, m, p_over_m) + rest * kl_terms(q, m, q_over_m)
    return value, rest * times(q, q_over_m), 0.0


@triton.jit
def _skew_forward_kl(p, q, log_p, log_q, alpha, rest):
    m, p_over_m, q_over_m = _mixture(p, q, log_p, log_q, alpha, rest)
    return kl_terms(p, m, p_over_m), -rest * p * tl.exp(q_over_m), rest


@triton.jit
def _skew_reverse_kl(p, q, log_p, log_q, alpha, rest):
    m, _, q_over_m = _mixture(p, q, log_p, log_q, rest, alpha)
    return kl_terms(q, m, q_over_m), times(q, q_over_m - alpha * tl.exp(q_over_m)), -rest


@triton.jit
def _tvd(p, q):
    # q - p is 0 or NaN where neither is larger.
    sign = tl.where(q > p, 0.5, tl.where(q < p, -0.5, q - p))
    return sign * (q - p), sign * q, 0.0


@triton.jit
def terms(DIVERGENCE: tl.constexpr, p, q, log_p, log_q, alpha, beta, rest_alpha, rest_beta):
    """Terms of D, w, and the factor of sum p - sum q."""
    if DIVERGENCE == "forward_kl":
        value, w, excess = _forward_kl(p, q, log_p, log_q)
    elif DIVERGENCE == "reverse_kl":
        value, w, excess = _reverse_kl(p, q, log_p, log_q)
    elif DIVERGENCE == "symmetric_kl":
        forward, w_forward, _ = _forward_kl(p, q, log_p, log_q)
        reverse, w_reverse, _ = _reverse_kl(p, q, log_p, log_q)
        value, w = beta * forward + rest_beta * reverse, beta * w_forward + rest_beta * w_reverse
        excess = beta - rest_beta
    elif DIVERGENCE == "jsd":
        value, w, excess = _jsd(p, q, log_p, log_q, beta, rest_beta)
    elif DIVERGENCE == "skew_forward_kl":
        value, w, excess = _skew_forward_kl(p, q, log_p, log_q, alpha, rest_alpha)
    elif DIVERGENCE == "skew_reverse_kl":
        value, w, excess = _skew_reverse_kl(p, q, log_p, log_q, alpha, rest_alpha)
    else:
        tl.static_assert(DIVERGENCE == "tvd")
        value, w, excess = _tvd(p, q)
    return value, w, excess


@triton.jit
def sum_of_weights(DIVERGENCE: tl.constexpr, mass, mean_log_ratio, beta, rest_beta):
    """W of the divergences that need no pass of their own for it; mean_log_ratio = E_q[log q - log p]."""
    if DIVERGENCE == "reverse_kl":
        w = mean_log_ratio
    elif DIVERGENCE == "symmetric_kl":
        w = rest_beta * mean_log_ratio - beta * mass
    else:
        w = -mass
    return w


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def binary_kl(odds_p, odds_q):
    """KL divergence of label against rest, from the log-odds of both models, and q_y - p_y."""
    log_p, log_q = log_sigmoid(odds_p), log_sigmoid(odds_q)
    log_p_rest, log_q_rest = log_sigmoid(-odds_p), log_sigmoid(-odds_q)
    p, q, p_rest, q_rest = tl.exp(log_p), tl.exp(log_q), tl.exp(log_p_rest), tl.exp(log_q_rest)
    value = kl_terms(p, q, log_p - log_q) + kl_terms(p_rest, q_rest, log_p_rest - log_q_rest)
    # From the smaller numbers, which have more digits.
    return value, tl.where(odds_q > 0.0, p_rest - q_rest, q - p)
