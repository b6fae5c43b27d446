"""The m nearest centroids in plain PyTorch, with all N x K scores in memory; float64 too."""

import torch
from torch import Tensor


def assign(points_ND: Tensor, centroids_KD: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(labels, squared distances), each [N, m]."""
    wide = torch.promote_types(points_ND.dtype, torch.float32)
    x_ND, c_KD = points_ND.to(wide), centroids_KD.to(wide)
    score_NK = x_ND @ c_KD.t() - c_KD.square().sum(1) / 2
    # NaN is never chosen. The sort is stable, so that of equal scores the lower index comes first.
    score_NK = torch.where(score_NK.isnan(), -torch.inf, score_NK)
    best, labels = (part[:, :m] for part in score_NK.sort(dim=1, descending=True, stable=True))
    return torch.where(best == -torch.inf, -1, labels), distances(x_ND, best)


def distances(points_ND: Tensor, best_NM: Tensor) -> Tensor:
    """|x|^2 - 2 score, at least 0; NaN where nothing was chosen."""
    wide = points_ND.to(best_NM.dtype)
    found = (wide.square().sum(1, keepdim=True) - 2 * best_NM).clamp_min(0)
    return torch.where(best_NM == -torch.inf, torch.nan, found)
