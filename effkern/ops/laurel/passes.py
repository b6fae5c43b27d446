"""What an implementation of the CPU form takes: all rows, the small operands prepared by the driver.

    N tokens, D channels, S columns of A (down), R rows of B (up), P look-ahead products of earlier layers, M addends

Small operands are float32 (float64) where they are scalars or vectors, and of the type of x where they are matrices.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class ForwardPass(NamedTuple):
    branch_ND: Tensor
    x_ND: Tensor
    down_DS: Tensor | None
    up_RD: Tensor | None
    """B, times the inner norm's weight per channel where there is one."""
    past_NP: Tensor | None
    gram_RR: Tensor | None
    """B B^T in float32 (float64), with an inner norm."""
    low_rank_eps: float
    addends: tuple[Tensor, ...]
    alpha: Tensor
    """[1] or [D], like beta; coefficients [M, 1] or [M, D]."""
    beta: Tensor
    coefficients: Tensor | None
    norm_weight: Tensor | None
    norm_eps: float
    y_ND: Tensor
    """Written, like the three below."""
    own_NS: Tensor | None
    normed_ND: Tensor | None
    rstd_N: Tensor | None


class BackwardPass(NamedTuple):
    grad_y_ND: Tensor | None
    grad_normed_ND: Tensor | None
    grad_own_NS: Tensor | None
    x_ND: Tensor
    y_ND: Tensor | None
    """Needed with a norm, and for alpha's gradient where the branch was not kept."""
    branch_ND: Tensor | None
    own_NS: Tensor | None
    rstd_N: Tensor | None
    down_DS: Tensor | None
    up_RD: Tensor | None
    """beta B, times the inner norm's weight."""
    past_NP: Tensor | None
    gram_RR: Tensor | None
    low_rank_eps: float
    addends: tuple[Tensor, ...]
    alpha: Tensor
    beta: Tensor
    coefficients: Tensor | None
    norm_weight: Tensor | None
    grad_branch_ND: Tensor
    """Written, like grad_x and grad_addends."""
    grad_x_ND: Tensor
    grad_addends: tuple[Tensor, ...]
    sums: Tensor | None
    """Written, like all below. See BackwardRows in rows.py."""
    grad_norm_weight: Tensor | None
    grad_down_DS: Tensor | None
    """Of A's own type where the implementation says so, otherwise float32 (float64), like all below but grad_past."""
    grad_up_RD: Tensor | None
    """v^T g, without beta."""
    grad_gram_RR: Tensor | None
    grad_past_NP: Tensor | None
    """In its own type."""


class Passes(NamedTuple):
    forward: Callable[[ForwardPass], None]
    backward: Callable[[BackwardPass], None]
    scaled_up: Callable[[Tensor, Tensor | None, Tensor | None, torch.dtype], Tensor]
    """B [R, D], the inner norm's weight [D], beta [1] or [D] (both optional), type -> B times both, in that type."""
    up_grads: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    """B, grad_up of the pass above, beta, 1 or D -> beta grad_up; and the sums of B grad_up, over all or over rows."""
    rounds_grad_down: bool
    """Whether grad_down is written in the type of A."""
