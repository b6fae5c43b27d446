"""Rules of loop_step's arguments."""

from typing import Any

import torch
from torch import Tensor

OP = "loop_step"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Below it, s may be too small a number to be divided by the norm's weight.
LEAST_WEIGHT = 2.0**-60


def check_streams(f: Tensor, h: Tensor, e: Tensor | None) -> None:
    for name, x in (("f", f), ("h", h), ("e", e)):
        if not isinstance(x, Tensor) and (x is not None or name != "e"):
            raise TypeError(f"{OP}: {name} must be a tensor, got {_said(x)}")
    if h.dtype not in DTYPES:
        raise TypeError(f"{OP}: h must be float32, bfloat16, float16 or float64, got {h.dtype}")
    if h.dim() < 1 or h.shape[-1] == 0:
        raise ValueError(f"{OP}: h must have shape (..., D) with D >= 1, got {tuple(h.shape)}")
    for name, x in (("f", f), ("e", e)):
        if x is None:
            continue
        _floating(name, x)
        if x.shape != h.shape:
            raise ValueError(f"{OP}: {name} must have the shape of h, {tuple(h.shape)}, got {tuple(x.shape)}")
        _same_device(name, x, h)


def check_factor(name: str, factor: Any, h: Tensor) -> None:
    dim = h.shape[-1]
    if isinstance(factor, Tensor):
        _floating(name, factor)
        if factor.shape not in ((), (1,), (dim,)):
            rule = f"be a number or have shape (), (1,) or ({dim},)"
            raise ValueError(f"{OP}: {name} must {rule}, got {tuple(factor.shape)}")
        _same_device(name, factor, h)
        return
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise TypeError(f"{OP}: {name} must be a number or a tensor, got {_said(factor)}")
    if not -float("inf") < factor < float("inf"):
        raise ValueError(f"{OP}: {name} must be finite, got {factor!r}")


def check_low_rank(low_rank: Any, h: Tensor) -> None:
    if low_rank is None:
        return
    pair = isinstance(low_rank, (tuple, list)) and len(low_rank) == 2
    if not pair or not all(isinstance(m, Tensor) for m in low_rank):
        raise TypeError(f"{OP}: low_rank must be a pair of tensors (A, B), got {_said(low_rank)}")
    dim = h.shape[-1]
    down, up = low_rank
    for name, matrix in (("low_rank[0]", down), ("low_rank[1]", up)):
        _floating(name, matrix)
        _same_device(name, matrix, h)
    if down.dim() != 2 or down.shape[0] != dim or not 1 <= down.shape[1] <= dim:
        rule = f"have shape ({dim}, r) with 1 <= r <= {dim}"
        raise ValueError(f"{OP}: low_rank[0] must {rule}, got {tuple(down.shape)}")
    if up.shape != (down.shape[1], dim):
        rule = f"have shape ({down.shape[1]}, {dim}), r as in low_rank[0]"
        raise ValueError(f"{OP}: low_rank[1] must {rule}, got {tuple(up.shape)}")


def check_vector(name: str, x: Any, h: Tensor) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{OP}: {name} must be a tensor, got {_said(x)}")
    _floating(name, x)
    if x.shape != h.shape[-1:]:
        raise ValueError(f"{OP}: {name} must have shape ({h.shape[-1]},), got {tuple(x.shape)}")
    _same_device(name, x, h)


def check_eps(eps: Any) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{OP}: eps must be a number, got {_said(eps)}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{OP}: eps must be at least 0 and finite, got {eps!r}")


def not_covered(impl: str, h: Tensor) -> str | None:
    """The rule of an implementation that these inputs break."""
    if impl == "cpp" and h.dtype not in (torch.float32, torch.bfloat16):
        return f"float32 and bfloat16, got {h.dtype}"
    if impl == "triton" and h.dtype == torch.float64:
        return f"float32, bfloat16 and float16, got {h.dtype}"
    return None


def keeps_branch(save_branch: bool | None, norm: bool, weight: Tensor | None, h: Tensor) -> bool:
    """Whether a norm's backward needs f and h: s / weight is unknown where the weight is 0.

    Looked at on the CPU alone: elsewhere it is a wait. float16 has too small a range for it.
    """
    if not norm or weight is None:
        return norm and bool(save_branch)
    if not torch.is_grad_enabled():
        return False
    seen = not torch.compiler.is_compiling() and weight.device.type == "cpu"
    if save_branch or (save_branch is None and (h.dtype == torch.float16 or not seen)):
        return True
    if not seen:
        return False
    least = weight.detach().abs().min().item()
    if save_branch is None:
        return not least >= LEAST_WEIGHT
    if not least >= LEAST_WEIGHT:
        rule = f"be at least {LEAST_WEIGHT:.1e} in size with save_branch=False"
        raise ValueError(f"{OP}: norm_weight must {rule}, got {least:.3g}")
    return False


def _said(x: Any) -> str:
    return "None" if x is None else type(x).__name__


def _floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{OP}: {name} must be of a floating dtype, got {x.dtype}")


def _same_device(name: str, x: Tensor, h: Tensor) -> None:
    if x.device != h.device:
        raise ValueError(f"{OP}: {name} must be on {h.device}, got {x.device}")
