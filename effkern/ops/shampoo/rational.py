"""Partial fractions for x^exponent: poles of Zolotarev's approximation of x^(-1/2), weights for any exponent.

sum_k w_k / (x + t_k) on [delta, 1] has, for x^(-1/2), the smallest possible largest relative error with the poles
t_k = delta sc^2((2k - 1) K / (2N), m), m = 1 - delta: K the complete elliptic integral, sc = sn / cn. The error falls
by exp(-2 pi^2 / (log(1 / delta) + 3)) per pole (Hale, Higham, Trefethen 2008).
"""

import math
from functools import lru_cache

import torch

MOST_TERMS = 24
POINTS = 1200


def tolerance(ridge: float) -> float:
    """Largest relative error of a root's eigenvalues: below what a float32 eigh loses, about eps / ridge and more.

    That gives 7 poles at a ridge of 1e-6, 1e-5 and 1e-4, and 6 at 1e-2 (python -m benchmarks.ops.shampoo_precision).
    """
    return min(1.2e-3, 1e-8 / ridge)


def terms(exponent: float, ridge: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Poles and weights for x in [delta, 1] with delta = ridge / (1 + ridge); the last weight is a constant's.

    The constant is 0 for exponents up to -1/2, where it gains nothing.
    """
    return _terms(exponent, ridge)


# A traced call takes the numbers as they stand (see registry.choose).
terms._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _terms(exponent: float, ridge: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    delta = ridge / (1.0 + ridge)
    for count in range(2, MOST_TERMS + 1):
        poles = _poles(count, delta)
        weights, error = _weights(poles, delta, exponent)
        if error <= tolerance(ridge):
            break
    return tuple(poles), tuple(weights)


def _poles(count: int, delta: float) -> list[float]:
    quarter = math.pi / 2 / _agm(1.0, math.sqrt(delta))
    found = []
    for k in range(1, count + 1):
        sn, cn = _elliptic((2 * k - 1) * quarter / (2 * count), 1.0 - delta)
        found.append(delta * (sn / cn) ** 2)
    return found


def _agm(a: float, b: float) -> float:
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return a


def _elliptic(u: float, m: float) -> tuple[float, float]:
    """sn and cn, by descending Landen transformations (Abramowitz and Stegun 16.4)."""
    a, c, b = [1.0], [math.sqrt(m)], math.sqrt(1.0 - m)
    while abs(c[-1]) > 1e-16 and len(a) < 16:
        a, c, b = [*a, (a[-1] + b) / 2], [*c, (a[-1] - b) / 2], math.sqrt(a[-1] * b)
    angle = 2.0 ** (len(a) - 1) * a[-1] * u
    for i in range(len(a) - 1, 0, -1):
        angle = (math.asin(c[i] / a[i] * math.sin(angle)) + angle) / 2
    return math.sin(angle), math.cos(angle)


def _weights(poles: list[float], delta: float, exponent: float) -> tuple[list[float], float]:
    """Weights of the least largest relative error over the interval, by Lawson's reweighted least squares."""
    x = torch.logspace(math.log10(delta), 0.0, POINTS, dtype=torch.float64)
    columns = [1.0 / (x + t) for t in poles]
    if exponent > -0.5:
        columns.append(torch.ones_like(x))
    basis = torch.stack(columns, 1) / x[:, None] ** exponent
    # Columns of one size: their scales differ by 1 / delta.
    sizes = basis.norm(dim=0)
    basis = basis / sizes
    importance = torch.ones_like(x)
    best, found = math.inf, torch.zeros(basis.shape[1], dtype=torch.float64)
    for _ in range(40):
        root = importance.sqrt()[:, None]
        solution = torch.linalg.lstsq(basis * root, root).solution[:, 0]
        error = (basis @ solution - 1.0).abs()
        if error.max().item() < best:
            best, found = error.max().item(), solution / sizes
        importance = importance * (error / error.mean()).clamp(0.2, 5.0)
        importance = importance / importance.mean()
    weights = found.tolist()
    return weights if exponent > -0.5 else [*weights, 0.0], best
