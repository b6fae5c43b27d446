"""Symmetric matrices that are hard for an eigensolver, each with what makes it hard."""

import torch
from torch import Tensor


def orthogonal(count: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(torch.randn(count, n, n, dtype=torch.float64))[0].to(dtype)


def with_spectrum(values: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Q diag(values) Q^T, made in float64 and exactly symmetric."""
    q = orthogonal(count, len(values), torch.float64)
    a = (q * values.double()) @ q.mT
    return ((a + a.mT) / 2).to(dtype)


def families(n: int, dtype: torch.dtype, count: int = 3) -> dict[str, Tensor]:
    """name -> [count, n, n]."""
    tiny, huge = (1e-30, 1e30) if dtype == torch.float32 else (1e-200, 1e200)
    random = torch.randn(count, n, n, dtype=dtype)
    random = (random + random.mT) / 2
    close = 1 + torch.arange(n, dtype=torch.float64) * torch.finfo(dtype).eps
    clusters = torch.where(torch.arange(n) % 2 == 0, close, -3 * close)
    low = torch.randn(count, n, max(1, n // 3), dtype=dtype)
    # Powers of two on the diagonal: D H D is exact.
    scales = 2.0 ** -torch.linspace(0, 20, n).round().to(dtype)
    h = torch.eye(n, dtype=dtype) + 0.3 * random / max(1.0, float(n)) ** 0.5 / 2
    arrow = torch.diag(torch.linspace(1, 2, n, dtype=dtype)).repeat(count, 1, 1)
    arrow[:, :, -1] = arrow[:, -1, :] = 1e-3
    return {
        "random": random,
        "clustered": with_spectrum(clusters, count, dtype),
        "rank-deficient": low @ low.mT,
        "graded 1e12": with_spectrum(torch.logspace(0, -12, n, dtype=torch.float64), count, dtype),
        "graded diagonal": scales[:, None] * h * scales,
        "zero": torch.zeros(count, n, n, dtype=dtype),
        "diagonal": torch.diag_embed(torch.randn(count, n, dtype=dtype)),
        "identity": torch.eye(n, dtype=dtype).repeat(count, 1, 1),
        "all ones": torch.ones(count, n, n, dtype=dtype),
        "arrow": arrow,
        "nearly diagonal": torch.diag_embed(torch.rand(count, n, dtype=dtype)) + 1e-6 * random,
        "tiny": random * tiny,
        "huge": random * huge,
        "zero diagonal": random - torch.diag_embed(random.diagonal(dim1=1, dim2=2)),
    }


def errors(matrices: Tensor, values: Tensor, vectors: Tensor) -> tuple[float, float]:
    """(backward error, loss of orthogonality), the worst of the batch, in units of n eps."""
    n, eps = matrices.shape[-1], torch.finfo(matrices.dtype).eps
    a, w, q = matrices.double(), values.double(), vectors.double()
    # Brought to size 1: squares of a norm must not overflow.
    size = a.abs().amax((-2, -1)).clamp_min(torch.finfo(torch.float64).tiny)
    a, w = a / size[:, None, None], w / size[:, None]
    residual = ((q * w[:, None, :]) @ q.mT - a).norm(dim=(-2, -1)) / a.norm(dim=(-2, -1)).clamp_min(1e-300)
    orthogonality = (q.mT @ q - torch.eye(n, dtype=torch.float64)).norm(dim=(-2, -1))
    unit = n * eps
    return residual.max().item() / unit, orthogonality.max().item() / unit
