"""Grafting: the direction is Shampoo's, the length that of another method's step, block by block.

    none      U as it is
    rms       graft_scale sqrt(m n): the root of the mean square of U's entries is graft_scale
    sgd       |M^|
    adagrad   |M^ / (sqrt(V) + eps)|, V += G^2
    rmsprop   |M^ / (sqrt(V) + eps)|, V = beta2 V + (1 - beta2) G^2, beta2 = adamw_betas[1]
    adam      the same with V / (1 - beta2^t)

M^ = M / (1 - beta1^t) with bias_correction, else M. Before start_step the other method's step itself is taken: M^ for
"none" and "sgd", graft_scale sqrt(m n) M / |M| for "rms", M^ / (sqrt(V) + eps) for the rest.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SECOND_MOMENT = ("adagrad", "rmsprop", "adam")


def second_moment_(
    group: dict[str, Any], moments: Sequence[Tensor], grads: Tensor, skip: Tensor, step: int
) -> list[Tensor]:
    """Update V of each block, unless it is skipped; returns sqrt(V) + eps."""
    kept = [m.clone() for m in moments] if bool(skip.device.type != "cpu" or skip.any()) else None
    beta = group["adamw_betas"][1]
    if group["grafting"] == "adagrad":
        torch._foreach_addcmul_(list(moments), list(grads.unbind()), list(grads.unbind()), 1.0)
    else:
        torch._foreach_mul_(list(moments), beta)
        torch._foreach_addcmul_(list(moments), list(grads.unbind()), list(grads.unbind()), 1.0 - beta)
    if kept is not None:
        for moment, old, out in zip(moments, kept, skip):
            moment.copy_(torch.where(out, old, moment))
    correction = 1.0 - beta**step if group["grafting"] == "adam" else 1.0
    roots = torch._foreach_div(list(moments), correction)
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, group["eps"])
    return list(roots)
