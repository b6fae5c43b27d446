"""Sums of gradients that a trainer keeps beside `p.grad`, in float32 at least."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from effkern.nn.looped.body import OP


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def check_main_grads(params: Iterable[Tensor]) -> None:
    """Raises ValueError if one is there that no sum can be added to."""
    for p in params:
        main = getattr(p, "main_grad", None)
        if main is None:
            continue
        got = (tuple(main.shape), main.dtype, main.device) if isinstance(main, Tensor) else type(main).__name__
        if got != (tuple(p.shape), wide(p.dtype), p.device):
            raise ValueError(
                f"{OP}: main_grad of a parameter must be {wide(p.dtype)} of shape {tuple(p.shape)} on {p.device}, "
                f"got {got}"
            )


def main_grad_of(p: Tensor) -> Tensor:
    """The one that is there, or zeros put there."""
    if getattr(p, "main_grad", None) is None:
        p.main_grad = torch.zeros_like(p, dtype=wide(p.dtype))  # type: ignore[attr-defined]
    return p.main_grad  # type: ignore[attr-defined]


def asked_for(p: Tensor) -> bool:
    """Whether the backward pass that runs now is to find p's gradient; torch.autograd.grad for others is not."""
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(p).node)
    except RuntimeError:
        # Raised for a leaf that is an input of torch.autograd.grad itself.
        return True
