"""What the passes over N x D take: one chunk of rows, everything wide at once.

    C rows of a chunk, D channels, M addends

Forward: y = alpha f + beta (x + low_rank) + sum_j c_j e_j, and z = y rstd w, rstd = (mean(y^2) + eps)^-1/2.
Backward: g = g_y + rstd (h - yh mean(h yh)) with h = g_z w and yh = y rstd, and what follows from it per element.
"""

from typing import NamedTuple

from torch import Tensor


class ForwardRows(NamedTuple):
    branch_CD: Tensor
    x_CD: Tensor
    low_rank_CD: Tensor | None
    """v B, in the type of x."""
    addends: tuple[Tensor, ...]
    alpha: Tensor
    """float32 (float64) [1] or [D], like beta; coefficients [M, 1] or [M, D]."""
    beta: Tensor
    coefficients: Tensor | None
    norm_weight: Tensor | None
    norm_eps: float
    y_CD: Tensor
    """Written, like the two below. May be the memory of `low_rank_CD`."""
    normed_CD: Tensor | None
    rstd_C: Tensor | None


class BackwardRows(NamedTuple):
    grad_y_CD: Tensor | None
    grad_normed_CD: Tensor | None
    x_CD: Tensor
    y_CD: Tensor | None
    """Needed with a norm, and for alpha's gradient where the branch was not kept."""
    branch_CD: Tensor | None
    rstd_C: Tensor | None
    addends: tuple[Tensor, ...]
    alpha: Tensor
    coefficients: Tensor | None
    norm_weight: Tensor | None
    g_CD: Tensor
    """Written: float32 (float64)."""
    rounded_CD: Tensor | None
    """Written: g in the type of x, for matrix products."""
    grad_branch_CD: Tensor | None
    """Written: alpha g. None where it is `g_CD` or `rounded_CD` itself, as alpha is 1."""
    grad_addends: tuple[Tensor, ...]
    """Written: c_j g."""
    sums: Tensor | None
    """Added to, float64 [2 + M, 1] or, per channel, [2 + M, D]: sums over rows (and channels) of g times f (where
    it was kept, otherwise y; untouched where there is neither), x, and each addend."""
    grad_norm_weight_D: Tensor | None
    """Added to, float32 (float64): sum over rows of g_z yh."""
