"""Eigen-decomposition of a batch by torch.linalg.eigh, which a NaN in one matrix does not end."""

import torch
from torch import Tensor


def batched_eigh(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, n, n] -> values [B, n] ascending, vectors [B, n, n] in columns, status [B]."""
    lower = matrices.tril()
    finite = lower.isfinite().all(-1).all(-1)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], lower, eye))
    nan = float("nan")
    return (
        torch.where(finite[:, None], values, nan),
        torch.where(finite[:, None, None], vectors, nan),
        (~finite).to(torch.int32),
    )
