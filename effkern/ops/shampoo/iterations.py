"""Inverse roots by products alone: Polar Express (Y, Z), its Gram form, coupled Newton; fixed numbers of steps.

All take A / s + ridge with s >= lambda_max. `Products` says who multiplies: torch here, one kernel for all in Triton.
"""

import math

import torch
from torch import Tensor

# Polar Express (arXiv 2505.16932), for eigenvalues of at least 1e-6.
POLAR_EXPRESS = (
    (8.28721, -23.59589, 17.30039),
    (4.10706, -2.94785, 0.54484),
    (3.94869, -2.90890, 0.55182),
    (3.31842, -2.48849, 0.51005),
    (2.30065, -1.66890, 0.41881),
    (1.89130, -1.26800, 0.37680),
    (1.87500, -1.25000, 0.37500),
)
# Eigenvalues above 1 by rounding would be thrown out.
SAFETY = 1.01


class Products:
    """alpha C + beta X Y. `mirror`: the result is symmetric up to rounding that does no harm, so that one triangle may
    be computed and mirrored."""

    def fused(self, X: Tensor, Y: Tensor, beta: float, alpha: float, C: Tensor | None, mirror: bool) -> Tensor:
        product = beta * (X @ Y)
        return product if C is None else alpha * C + product


def quintics(ridge: float) -> list[tuple[float, float, float]]:
    """Steps for eigenvalues from `ridge` on: the table, then Newton's own until the smallest has arrived."""
    last = len(POLAR_EXPRESS) - 1
    steps = []
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        safe = 1.0 if i == last else SAFETY
        steps.append((a / safe, b / safe**3, c / safe**5))
    x, more = math.sqrt(ridge), 0
    for a, b, c in steps:
        x = min(1.0, a * x + b * x**3 + c * x**5)
    while abs(1.0 - x) > 1e-7 and more < 12:
        x = 1.875 * x - 1.25 * x**3 + 0.375 * x**5
        steps.append(POLAR_EXPRESS[last])
        more += 1
    return steps


def root(A: Tensor, top: Tensor, method: str, p: int, ridge: float, products: Products | None = None) -> Tensor:
    """(A + ridge top)^(-1/p); A [B, n, n] and top [B]."""
    products = products or Products()
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    damped = A + (ridge * top)[:, None, None] * eye
    # lambda_max is at most the largest row sum and the Frobenius norm.
    s = torch.minimum(damped.abs().sum(2).amax(1), damped.norm(dim=(1, 2)))[:, None, None]
    # What the smallest eigenvalue may be after the division: the bounds are at most sqrt(n) above lambda_max.
    least = ridge / math.sqrt(A.shape[1])
    scaled = damped / s
    if method == "coupled_newton":
        return _coupled_newton(scaled, p, least, products) * s ** (-1.0 / p)
    if method == "gram_ns":
        return _gram(scaled, quintics(least), products) * s**-0.5
    Y, Z = _coupled(scaled, quintics(least), products)
    if p == 2:
        return Z * s**-0.5
    # A^(1/2), whose smallest eigenvalue is the root of A's.
    Y = (Y + Y.mT) / 2
    _, Z = _coupled(Y, quintics(math.sqrt(least)), products)
    return Z * s**-0.25


def _coupled(A: Tensor, steps: list[tuple[float, float, float]], k: Products) -> tuple[Tensor, Tensor]:
    """A^(1/2), A^(-1/2). P = Z Y, B = b P + c P^2, Y <- a Y + Y B, Z <- a Z + B Z; only the updates are mirrored.

    In the first step P = Y = A and Z = I.
    """
    a, b, c = steps[0]
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    B = k.fused(A, A, c, b, A, False)
    Y, Z = k.fused(A, B, 1.0, a, A, True), a * eye + B
    for a, b, c in steps[1:]:
        P = k.fused(Z, Y, 1.0, 0.0, None, False)
        B = k.fused(P, P, c, b, P, False)
        Y, Z = k.fused(Y, B, 1.0, a, Y, True), k.fused(B, Z, 1.0, a, Z, True)
    return Y, (Z + Z.mT) / 2


def _gram(A: Tensor, steps: list[tuple[float, float, float]], k: Products) -> Tensor:
    """Q -> A^(-1/2). W = a I + b R + c R^2, Q <- Q W, R <- W R W; everything is a polynomial in A, all is mirrored."""
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    R, Q = A, None
    for i, (a, b, c) in enumerate(steps):
        W = k.fused(R, R, c, b, R, True) + a * eye
        Q = W if Q is None else k.fused(Q, W, 1.0, 0.0, None, True)
        if i + 1 < len(steps):
            R = k.fused(k.fused(W, R, 1.0, 0.0, None, True), W, 1.0, 0.0, None, True)
    assert Q is not None
    return Q


def newton_steps(p: int, least: float) -> int:
    """Until the smallest eigenvalue of M, which grows by ((1 + p) / p)^p at first, has reached 1."""
    x, count = least * (1 + p) / 2, 0
    while abs(1.0 - x) > 1e-7 and count < 200:
        x *= ((1 + p - x) / p) ** p
        count += 1
    return count + 1


def _coupled_newton(A: Tensor, p: int, least: float, k: Products) -> Tensor:
    """X -> A^(-1/p). T = ((1 + p) I - M) / p, X <- X T, M <- T^p M; X = z^(1/p) I, M = z A, z = (1 + p) / 2."""
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    z = (1 + p) / 2
    M, X = z * A, z ** (1.0 / p) * eye.expand_as(A).contiguous()
    for _ in range(newton_steps(p, least)):
        T = ((1 + p) * eye - M) / p
        X = k.fused(X, T, 1.0, 0.0, None, False)
        power = _power(T, p, k)
        M = k.fused(power, M, 1.0, 0.0, None, False)
    return X


def _power(T: Tensor, p: int, k: Products) -> Tensor:
    """T^p by squaring."""
    found, square = None, T
    while True:
        if p & 1:
            found = square if found is None else k.fused(found, square, 1.0, 0.0, None, False)
        p >>= 1
        if p == 0:
            assert found is not None
            return found
        square = k.fused(square, square, 1.0, 0.0, None, False)
