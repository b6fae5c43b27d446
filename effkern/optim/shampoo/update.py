"""The update of a stack of blocks in plain torch: every option, every device, shards of a matrix.

The op effkern.ops.shampoo.apply_ does the common cases in one pass; this is what it is told apart from.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.optim.shampoo.grafting import SECOND_MOMENT, second_moment_

TINY = 1e-30


def _norms(stack: Tensor, add_up: Callable[[Tensor], Tensor]) -> Tensor:
    """Frobenius norm of each block, of all its shards."""
    return add_up(stack.square().sum(dim=(1, 2))).sqrt()


def update_(
    group: dict[str, Any],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    moments: Sequence[Tensor] | None,
    roots: tuple[Tensor | None, Tensor | None],
    skip: Tensor,
    step: int,
    scale: float,
    size: tuple[int, int],
    add_up: Callable[[Tensor], Tensor],
) -> None:
    """One step of blocks [m, n], in place.

        M <- beta1 M + (1 - beta1) G
        W <- (1 - lr weight_decay) W - lr gamma L^-a M R^-b

    Args:
        momenta: of the blocks, None with beta1 = 0. moments: second moments, where grafting needs them.
        roots: L^-a [B, m, m] and R^-b [B, n, n]; (None, None) takes the other method's step (before start_step).
        skip: [B], blocks that stay as they are.
        scale: of the direction without grafting: bias correction.
        size: (m, n) of the whole block, which the shapes here are shards of.
        add_up: sums a tensor over the processes that hold shards.
    """
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    grad = torch.stack(list(grads)).to(dtype)
    skipped = skip[:, None, None]
    grad = torch.where(skipped, torch.zeros((), dtype=dtype, device=grad.device), grad)
    beta = group["betas"][0]
    moved = grad
    if momenta is not None:
        old = torch.stack(list(momenta))
        moved = torch.where(skipped, old, old.lerp(grad, 1.0 - beta))
        torch._foreach_copy_(list(momenta), list(moved.unbind()))
    correction = 1.0 - beta**step if group["bias_correction"] else 1.0
    kind, size_norm = group["grafting"], group["graft_scale"] * (size[0] * size[1]) ** 0.5
    other = moved
    if kind in SECOND_MOMENT:
        assert moments is not None
        other = moved / torch.stack(second_moment_(group, moments, grad, skip, step))
    left, right = roots
    if left is None and right is None:
        direction, length = other, None
    else:
        direction = moved if left is None else left @ moved
        direction = direction if right is None else direction @ right
        length = None if kind in ("none", "rms") else _norms(other, add_up) / correction
    if kind == "rms":
        length = torch.full_like(skip, size_norm, dtype=dtype)
    if length is None:
        factor = torch.full_like(skip, scale, dtype=dtype)
    else:
        norm = _norms(direction, add_up)
        factor = torch.where(norm > TINY, length / norm.clamp_min(TINY), torch.zeros_like(norm))
    lr = group["lr"]
    lr = lr.reshape(()).to(skip.device, dtype) if isinstance(lr, Tensor) else lr
    old = torch.stack(list(weights)).to(dtype)
    kept = old - lr * group["weight_decay"] * old - (lr * factor)[:, None, None] * direction
    kept = torch.where(skipped, old, kept)
    torch._foreach_copy_(list(weights), list(kept.unbind()))
