"""What the reference and the Triton launchers share around the roots: guards, the largest eigenvalue, the probe."""

import math

import torch
from torch import Tensor

# Enough for 1e-5 where the largest eigenvalues lie within some percent.
LANCZOS_STEPS = 32
SQUARINGS = 14


def count(failures: Tensor | None, ok: Tensor) -> None:
    """failures[b] = 0 where ok, else one more."""
    if failures is not None:
        failures.copy_(torch.where(ok, 0, failures + 1))


def guard(factor_Bpp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A with both triangles from the lower one, whether it is finite, whether it is 0; the identity in both cases."""
    lower = factor_Bpp.tril()
    A = lower + factor_Bpp.tril(-1).mT
    ok = torch.isfinite(lower).all(2).all(1)
    zero = (lower == 0).all(2).all(1)
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    return torch.where((ok & ~zero)[:, None, None], A, eye), ok, zero


def signs(p: int, like: Tensor) -> Tensor:
    """A fixed vector of +-1 without structure, [p]: bits of a multiplicative hash."""
    i = torch.arange(1, p + 1, device=like.device, dtype=torch.int64)
    return (((i * 2654435761) >> 16) & 1).to(like.dtype) * 2.0 - 1.0


def lambda_max(A_Bpp: Tensor) -> Tensor:
    """Largest eigenvalue, [B]: Lanczos from the longest row and, a tenth of it, the signs, every vector
    orthogonalised against all before; then powers of the small matrix. No host synchronisation.

    The longest row is no shorter than lambda_max / sqrt(p), and what is found is no less: no direction is overlooked.
    """
    p = A_Bpp.shape[1]
    tiny = torch.finfo(A_Bpp.dtype).tiny
    # Scaled before it is squared.
    rows = A_Bpp / A_Bpp.diagonal(dim1=1, dim2=2).amax(1).clamp_min(tiny)[:, None, None]
    lengths = rows.norm(dim=2)
    largest = lengths.argmax(1)[:, None, None]
    row = rows.gather(1, largest.expand(-1, -1, p)).mT / lengths.amax(1).clamp_min(tiny)[:, None, None]
    x = row + 0.1 / math.sqrt(p) * signs(p, A_Bpp)[:, None]
    vectors: list[Tensor] = []
    products: list[Tensor] = []
    for _ in range(min(LANCZOS_STEPS, p)):
        before = x.norm(dim=1, keepdim=True).clamp_min(tiny)
        # Twice is enough (Parlett).
        for _ in range(2 if vectors else 0):
            V = torch.cat(vectors, 2)
            x = x - V @ (V.mT @ x)
        length = x.norm(dim=1, keepdim=True)
        # What is left of a closed space is rounding.
        x = torch.where(length > 1e-5 * before, x / length, 0.0)
        vectors.append(x)
        products.append(A_Bpp @ x)
        x = products[-1]
    V = torch.cat(vectors, 2)
    T = V.mT @ torch.cat(products, 2)
    T = (T + T.mT) / 2
    power = T
    for _ in range(SQUARINGS):
        power = power / power.norm(dim=(1, 2), keepdim=True).clamp_min(tiny)
        power = power @ power
    # The column of the largest diagonal entry of a high power is the eigenvector.
    column = power.gather(2, power.diagonal(dim1=1, dim2=2).argmax(1)[:, None, None].expand(-1, T.shape[1], -1))
    column = column / column.norm(dim=1, keepdim=True).clamp_min(tiny)
    return (column * (T @ column)).sum((1, 2)).clamp_min(tiny)


def probe_residual(A_Bpp: Tensor, X_Bpp: Tensor, p: int) -> Tensor:
    """|X^p A v - v| / |v| for v of +-1, [B]; 0 for p = 0."""
    if p == 0:
        return torch.zeros(A_Bpp.shape[0], dtype=A_Bpp.dtype, device=A_Bpp.device)
    v = signs(A_Bpp.shape[1], A_Bpp)[None, :, None].expand(A_Bpp.shape[0], -1, 1)
    # Half of the roots on either side of A: no vector on the way is larger than it must be.
    x = v
    for _ in range(p // 2):
        x = X_Bpp @ x
    x = A_Bpp @ x
    for _ in range(p - p // 2):
        x = X_Bpp @ x
    return (x - v).norm(dim=(1, 2)) / v.norm(dim=(1, 2))
