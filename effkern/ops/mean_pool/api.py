"""mean_pool, norm_mean_pool: what a group of tokens is on average, without the tensor of all their rows."""

from typing import Any

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.mean_pool import reference
from effkern.ops.mean_pool import schema as schema

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One program of the Triton kernels holds a whole row.
TRITON_COLUMNS = 8192


def mean_pool(
    table_VD: Tensor,
    ids: Tensor,
    offsets: Tensor,
    *,
    pad: int | None = None,
    eod: int | None = None,
    normalize: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Mean of the table's rows that each group of ids names.

    y_n = 1/|K_n| sum_{t in K_n} table[ids_t],   K_n = {t : offsets_n <= t < offsets_{n+1}, ids_t not pad, not eod}

    With `normalize` y_n / |y_n| (Euclidean). A group that keeps nothing gives 0, as does a mean of 0. Sums are float32
    (float64), by "cpp" and "triton" of strips of rows first, so that long groups keep their digits. To project the
    means, fold the projection into the table: `fold_projection`.

    Args:
        table_VD: [V, D], float32/bfloat16/float16 (float64: reference), stride 1 along D.
        ids: int64 or int32, [T], contiguous, each in [0, V), `pad` or `eod`.
        offsets: int64, [N + 1], contiguous, from 0 to T, never falling.
        pad, eod: ids that do not count; None: all do.
        normalize: divide by the Euclidean norm.
        impl: "auto", "cpp", "triton" (CUDA; D <= 8192) or "reference".

    Returns:
        [N, D], float32 (float64).

    Raises:
        ValueError: a shape, layout or device is wrong; ids or offsets are out of range (looked at on the CPU outside
            torch.compile; elsewhere a group with such an id becomes NaN, and offsets are cut to [0, T]).
        TypeError: an unsupported dtype or type.
        NotImplementedError: the table requires a gradient (there is no backward; impl="reference" has autograd's), or
            impl does not cover device or dtype.

    Memory: the result. Deterministic: one task per group, no atomics, the same bits for any number of threads.
    Source: arXiv 2502.02494, section on embeddings (LM token embeddings).
    """
    _matrix("mean_pool", "table", table_VD, impl)
    _vector("mean_pool", "ids", ids, (torch.int64, torch.int32), table_VD.device)
    ignored = [_ignored(name, x) for name, x in (("pad", pad), ("eod", eod))]
    _offsets("mean_pool", offsets, ids.shape[0], table_VD.device)
    if not torch.compiler.is_compiling() and ids.device.type == "cpu" and ids.numel():
        _check_ids(ids, ignored, table_VD.shape[0])
    chosen = _choose("mean_pool", impl, table_VD)
    arguments: tuple[Any, ...] = (table_VD, ids, offsets, *ignored, bool(normalize))
    if chosen == "reference":
        return reference.mean_pool(*arguments)
    op = torch.ops.effkern.mean_pool if chosen == "cpp" else torch.ops.effkern.mean_pool_triton
    return op(*arguments)


def norm_mean_pool(
    hidden_TD: Tensor,
    offsets: Tensor,
    *,
    keep: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    normalize: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Mean over each group of the RMS-normalised rows, which are never written.

    y_n = w * 1/|K_n| sum_{t in K_n} h_t / sqrt(mean(h_t^2) + eps),   K_n = {t in group n : keep_t}

    Without `norm_weight` the mean of the rows as they are. `normalize`, empty groups, sums, errors, memory and
    determinism are as for `mean_pool`.

    Args:
        hidden_TD: rows before the norm, [T, D], float32/bfloat16/float16 (float64: reference), stride 1 along D.
        offsets: as for `mean_pool`.
        keep: bool, [T], contiguous: rows that count; None: all.
        norm_weight: w, [D], contiguous, dtype of `hidden` or float32. None: no norm.
        eps: >= 0.
        normalize, impl: as for `mean_pool`.

    Returns:
        [N, D], float32 (float64).
    Source: arXiv 2502.02494, section on embeddings (LM output embeddings).
    """
    op_name = "norm_mean_pool"
    _matrix(op_name, "hidden", hidden_TD, impl)
    _offsets(op_name, offsets, hidden_TD.shape[0], hidden_TD.device)
    if keep is not None:
        _vector(op_name, "keep", keep, (torch.bool,), hidden_TD.device, hidden_TD.shape[0])
    if norm_weight is not None:
        kinds = (hidden_TD.dtype, torch.float32)
        _vector(op_name, "norm_weight", norm_weight, kinds, hidden_TD.device, hidden_TD.shape[1])
        _no_gradient(op_name, "norm_weight", norm_weight, impl)
    if not eps >= 0:
        raise ValueError(f"{op_name}: eps must be at least 0, got {eps}")
    chosen = _choose(op_name, impl, hidden_TD)
    arguments: tuple[Any, ...] = (hidden_TD, offsets, keep, norm_weight, float(eps), bool(normalize))
    if chosen == "reference":
        return reference.norm_mean_pool(*arguments)
    op = torch.ops.effkern.norm_mean_pool if chosen == "cpp" else torch.ops.effkern.norm_mean_pool_triton
    return op(*arguments)


def _choose(op: str, impl: str, x: Tensor) -> str:
    chosen = registry.choose("mean_pool", impl, x.device)
    lacks = None
    if chosen != "reference" and x.dtype == torch.float64:
        lacks = "float64 tensors"
    elif chosen == "triton" and x.shape[1] > TRITON_COLUMNS:
        lacks = f"more than {TRITON_COLUMNS} columns, got {x.shape[1]}"
    if impl == "auto" and (lacks is not None or (chosen == "triton" and x.device.type == "cpu")):
        return "reference"
    if lacks is not None:
        raise NotImplementedError(f"{op}: impl={impl!r} does not cover {lacks}")
    return chosen


def _matrix(op: str, name: str, x: Any, impl: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{op}: {name} must have two dimensions and a column, got shape {list(x.shape)}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"{op}: {name} must have stride 1 along its columns, got {x.stride(1)}")
    _no_gradient(op, name, x, impl)


def _no_gradient(op: str, name: str, x: Tensor, impl: str) -> None:
    if impl != "reference" and x.requires_grad and torch.is_grad_enabled():
        rule = "not require a gradient (detach it, or take impl='reference')"
        raise NotImplementedError(f"{op}: {name} must {rule}, got requires_grad=True")


def _vector(
    op: str, name: str, x: Any, dtypes: tuple[torch.dtype, ...], device: torch.device, size: int | None = None
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        kinds = " or ".join(str(kind).removeprefix("torch.") for kind in dict.fromkeys(dtypes))
        raise TypeError(f"{op}: {name} must be {kinds}, got {x.dtype}")
    if x.dim() != 1 or not x.is_contiguous() or (size is not None and x.shape[0] != size):
        rule = f"be contiguous with shape [{'*' if size is None else size}]"
        raise ValueError(f"{op}: {name} must {rule}, got shape {list(x.shape)}, stride {list(x.stride())}")
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")


def _offsets(op: str, offsets: Any, num_rows: int, device: torch.device) -> None:
    _vector(op, "offsets", offsets, (torch.int64,), device)
    if offsets.shape[0] < 1:
        raise ValueError(f"{op}: offsets must have N + 1 entries, got none")
    if torch.compiler.is_compiling() or device.type != "cpu":
        return
    if offsets[0] != 0 or offsets[-1] != num_rows or (offsets.diff() < 0).any():
        got = f"{offsets[0].item()} to {offsets[-1].item()}"
        raise ValueError(f"{op}: offsets must go from 0 to {num_rows} and never fall, got {got}")


def _ignored(name: str, value: Any) -> int:
    if value is None:
        return -1
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"mean_pool: {name} must be an int or None, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"mean_pool: {name} must be at least 0, got {value}")
    return value


def _check_ids(ids: Tensor, ignored: list[int], num_rows: int) -> None:
    low, high = (x.item() for x in ids.aminmax())
    if low >= 0 and high < num_rows:
        return
    outside = (ids < 0) | (ids >= num_rows)
    for value in ignored:
        if value >= 0:
            outside &= ids != value
    if outside.any():
        raise ValueError(f"mean_pool: ids must lie in [0, {num_rows}), got {ids[outside][0].item()}")
