"""The maps from raw scalars to alpha and beta, and their gradients.

Raw scalars have shape [k] or, per channel, [k, D]; alpha and beta come as [1] or [D].
"""

import torch
from torch import Tensor

# Raw scalars per map. A plain residual, alpha = beta = 1, is softmax2 and sigmoid at 0 and none at 1.
SCALAR_MAPS = {"softmax2": 2, "softmax": 2, "sigmoid1": 1, "sigmoid": 2, "none": 2}


def rows_of(weights: Tensor) -> Tensor:
    """[k] -> [k, 1]; [k, D] as it is."""
    return weights[:, None] if weights.dim() == 1 else weights


def coefficients(weights: Tensor, scalar_map: str) -> tuple[Tensor, Tensor]:
    """alpha and beta, [1] or [D], in the type of `weights`.

    softmax2: 2 softmax(w).  softmax: softmax(w).  sigmoid1: s(w), 1 - s(w).  sigmoid: 2 s(w).  none: w.
    """
    w = rows_of(weights)
    if scalar_map == "softmax2":
        alpha, beta = 2.0 * w.softmax(0)
    elif scalar_map == "softmax":
        alpha, beta = w.softmax(0)
    elif scalar_map == "sigmoid1":
        # s(-w), which keeps its digits where 1 - s(w) loses them.
        alpha, beta = torch.cat([w, -w]).sigmoid()
    elif scalar_map == "sigmoid":
        alpha, beta = 2.0 * w.sigmoid()
    else:
        alpha, beta = w
    return alpha, beta


def gradient(weights: Tensor, scalar_map: str, grad_alpha: Tensor, grad_beta: Tensor) -> Tensor:
    """Gradient of the raw scalars, in their shape, from those of alpha and beta."""
    w = rows_of(weights)
    grad = torch.stack([grad_alpha, grad_beta]).to(w.dtype)
    if scalar_map in ("softmax2", "softmax"):
        factor = 2.0 if scalar_map == "softmax2" else 1.0
        s = w.softmax(0)
        one = factor * s[0] * s[1] * (grad[0] - grad[1])
        grad = torch.stack([one, -one])
    elif scalar_map == "sigmoid1":
        grad = ((grad[0] - grad[1]) * w.sigmoid() * (-w).sigmoid()).view_as(w)
    elif scalar_map == "sigmoid":
        grad = 2.0 * grad * w.sigmoid() * (-w).sigmoid()
    return grad.reshape(weights.shape)
