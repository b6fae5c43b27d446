"""Rules of laurel_residual's arguments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.ops.laurel.scalars import SCALAR_MAPS, coefficients

OP = "laurel_residual"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Below it, alpha's gradient loses more than three of the seven digits when the branch is not kept.
LEAST_ALPHA = 1e-3
# What the Triton kernels take: rows of up, and addends.
TRITON_RANK, TRITON_ADDENDS = 256, 4


def check_types(addends: Sequence[Tensor], scale: float, **tensors: Tensor | None) -> None:
    """What is no tensor, and what is no number, is said by name before anything is read from it."""
    for name in ("branch", "x"):
        if tensors[name] is None:
            raise TypeError(f"{OP}: {name} must be a tensor, got None")
    if not isinstance(addends, (list, tuple)):
        raise TypeError(f"{OP}: addends must be a sequence of tensors, got {addends!r}")
    for name, t in (*tensors.items(), *((f"addends[{j}]", e) for j, e in enumerate(addends))):
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(t).__name__}")
    if isinstance(scale, (bool, str)) or not isinstance(scale, (int, float)):
        raise TypeError(f"{OP}: scale must be a number, got {scale!r}")
    if not -float("inf") < scale < float("inf"):
        raise ValueError(f"{OP}: scale must be a finite number, got {scale!r}")


def check_stream(branch: Tensor, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{OP}: x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{OP}: x must have shape [..., D] with D >= 1, got {tuple(x.shape)}")
    if not branch.is_floating_point():
        raise TypeError(f"{OP}: branch must be of a floating dtype, got {branch.dtype}")
    if branch.shape != x.shape:
        raise ValueError(f"{OP}: branch must have the shape of x, {tuple(x.shape)}, got {tuple(branch.shape)}")
    _same_device("branch", branch, x)


def check_weights(weights: Tensor | None, scalar_map: str, dim: int, x: Tensor) -> None:
    if scalar_map not in SCALAR_MAPS:
        raise ValueError(f"{OP}: scalar_map must be one of {sorted(SCALAR_MAPS)}, got {scalar_map!r}")
    if weights is None:
        return
    count = SCALAR_MAPS[scalar_map]
    _wide("weights", weights)
    if weights.shape not in ((count,), (count, dim)):
        rule = f"have shape ({count},) or ({count}, {dim}) for scalar_map={scalar_map!r}"
        raise ValueError(f"{OP}: weights must {rule}, got {tuple(weights.shape)}")
    _same_device("weights", weights, x)


def check_low_rank(
    down: Tensor | None, up: Tensor | None, past: Tensor | None, low_rank_norm: Tensor | None, x: Tensor
) -> None:
    dim = x.shape[-1]
    for name, matrix in (("down", down), ("up", up), ("past", past), ("low_rank_norm", low_rank_norm)):
        if matrix is not None:
            if not matrix.is_floating_point():
                raise TypeError(f"{OP}: {name} must be of a floating dtype, got {matrix.dtype}")
            _same_device(name, matrix, x)
    if down is not None and (down.dim() != 2 or down.shape[0] != dim or down.shape[1] == 0):
        raise ValueError(f"{OP}: down must have shape ({dim}, columns >= 1), got {tuple(down.shape)}")
    if up is None:
        for name, other in (("past", past), ("low_rank_norm", low_rank_norm)):
            if other is not None:
                raise ValueError(f"{OP}: {name} must come with up, got up=None")
        return
    if up.dim() != 2 or up.shape[1] != dim or up.shape[0] < 1:
        raise ValueError(f"{OP}: up must have shape (rank >= 1, {dim}), got {tuple(up.shape)}")
    num_past = 0
    if past is not None:
        if past.shape[:-1] != x.shape[:-1]:
            rule = f"have the leading shape of x, {tuple(x.shape[:-1])} (one row per token of this very batch)"
            raise ValueError(f"{OP}: past must {rule}, got {tuple(past.shape[:-1])}")
        num_past = past.shape[-1]
        if num_past == 0:
            raise ValueError(f"{OP}: past must have at least one column, got 0")
        if num_past > up.shape[0]:
            raise ValueError(
                f"{OP}: past must have at most as many columns as up has rows, {up.shape[0]}, got {num_past}"
            )
    own = up.shape[0] - num_past
    have = 0 if down is None else down.shape[1]
    if own > have:
        rule = f"have at least {own} columns, the rows of up ({up.shape[0]}) that past ({num_past} columns) leaves"
        raise ValueError(f"{OP}: down must {rule}, got {have}")
    if own > dim:
        raise ValueError(f"{OP}: up must have a rank of at most D={dim}, got {own}")
    if low_rank_norm is not None and low_rank_norm.shape != (dim,):
        raise ValueError(f"{OP}: low_rank_norm must have shape ({dim},), got {tuple(low_rank_norm.shape)}")


def check_addends(addends: Sequence[Tensor], weights: Tensor | None, x: Tensor) -> None:
    for j, e in enumerate(addends):
        if e.dtype != x.dtype:
            raise TypeError(f"{OP}: addends[{j}] must have the dtype of x, {x.dtype}, got {e.dtype}")
        if e.shape != x.shape:
            raise ValueError(f"{OP}: addends[{j}] must have the shape of x, {tuple(x.shape)}, got {tuple(e.shape)}")
        _same_device(f"addends[{j}]", e, x)
    if weights is None:
        return
    count, dim = len(addends), x.shape[-1]
    _wide("addend_weights", weights)
    if not addends or weights.shape not in ((count,), (count, dim)):
        rule = f"have shape ({count},) or ({count}, {dim}), one row per addend"
        raise ValueError(f"{OP}: addend_weights must {rule}, got {tuple(weights.shape)}")
    _same_device("addend_weights", weights, x)


def check_norm(weight: Tensor | None, eps: float, low_rank_eps: float, x: Tensor) -> None:
    for name, value in (("norm_eps", eps), ("low_rank_eps", low_rank_eps)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{OP}: {name} must be at least 0 and finite, got {value!r}")
    if weight is None:
        return
    if not weight.is_floating_point():
        raise TypeError(f"{OP}: norm_weight must be of a floating dtype, got {weight.dtype}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{OP}: norm_weight must have shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    _same_device("norm_weight", weight, x)


def check_alpha(weights: Tensor, scalar_map: str) -> None:
    """Backward divides by alpha where the branch is not kept. Looked at on the CPU alone: elsewhere it is a wait."""
    if torch.compiler.is_compiling() or weights.device.type != "cpu" or not weights.requires_grad:
        return
    raw = weights.detach()
    # The default, decided by its two numbers alone: the operators of the map take 8 microseconds.
    if scalar_map == "softmax2" and raw.dim() == 1:
        first, second = raw.tolist()
        if abs(first) < 3.0 and abs(second) < 3.0:
            return
    least = coefficients(raw, scalar_map)[0].abs().min().item()
    if not least >= LEAST_ALPHA:
        raise ValueError(f"{OP}: alpha must be at least {LEAST_ALPHA} in size with save_branch=False, got {least:.3g}")


def not_covered(impl: str, x: Tensor, up: Tensor | None, addends: Sequence[Tensor]) -> str | None:
    """The rule of an implementation that these inputs break; the C++ passes take float32 and bfloat16."""
    if impl == "cpp" and x.dtype not in (torch.float32, torch.bfloat16):
        return f"float32 and bfloat16, got {x.dtype}"
    if impl == "triton":
        if x.dtype == torch.float64:
            return f"float32, bfloat16 and float16, got {x.dtype}"
        if up is not None and up.shape[0] > TRITON_RANK:
            return f"up with at most {TRITON_RANK} rows, got {up.shape[0]}"
        if len(addends) > TRITON_ADDENDS:
            return f"at most {TRITON_ADDENDS} addends, got {len(addends)}"
    return None


def _wide(name: str, weights: Tensor) -> None:
    if weights.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{OP}: {name} must be float32 (float64), half precision loses the sums, got {weights.dtype}")


def _same_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{OP}: {name} must be on {x.device}, got {t.device}")
