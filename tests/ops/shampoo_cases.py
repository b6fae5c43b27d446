"""Factors with the spectra that a root must bear, and their roots in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from effkern import native
from effkern.ops.shampoo import gram_ema_

CPP = native.load("_C") is None


def rotation(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def with_spectrum(values: Tensor) -> Tensor:
    Q = rotation(values.shape[0])
    return (Q * values) @ Q.T


def geometric(kappa: float) -> Callable[[int], Tensor]:
    return lambda n: with_spectrum(torch.logspace(0, -torch.tensor(kappa).log10().item(), n, dtype=torch.float64))


def spike(n: int) -> Tensor:
    """One direction a million times the others."""
    return with_spectrum(torch.cat([torch.ones(1), torch.full((n - 1,), 1e-6)]).double())


def rank_deficient(n: int) -> Tensor:
    G = torch.randn(n, n // 4, dtype=torch.float64)
    return G @ G.T


def ema(n: int, steps: int = 60, beta: float = 0.95) -> Tensor:
    """Of gradients of low rank plus noise; kappa about 1e5."""
    U, scale = rotation(n), torch.logspace(0, -2.6, n, dtype=torch.float64)
    L = torch.zeros(1, n, n, dtype=torch.float64)
    for _ in range(steps):
        G = U @ (scale[:, None] * torch.randn(n, n, dtype=torch.float64))
        gram_ema_(L, G[None], decay=beta, weight=1 - beta, impl="reference")
    return L[0]


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "geometric 1e2": geometric(1e2),
    "geometric 1e4": geometric(1e4),
    "geometric 1e6": geometric(1e6),
    "geometric 1e8": geometric(1e8),
    "spike": spike,
    "rank-deficient": rank_deficient,
    "EMA": ema,
}


def truth(A: Tensor, exponent: float = -0.5, ridge: float = 1e-6, scale: float = 1.0) -> Tensor:
    """From the eigenvalues in float64, independent of the package."""
    lam, Q = torch.linalg.eigh(A.double())
    lam = lam.clamp_min(0.0)
    f = (scale * (lam + ridge * lam[..., -1:])) ** exponent
    return (Q * f[..., None, :]) @ Q.mT


def symmetric(A: Tensor) -> Tensor:
    """In float32, and the same to the bit in both triangles."""
    A = A.float()
    return A.tril() + A.tril(-1).mT
