"""Rules of the arguments of Shampoo's operations.

B blocks of a batch, p side of a factor, m x n a block
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def said(value: Any) -> str:
    return type(value).__name__


def number(op: str, name: str, value: Any, low: float, rule: str, *, open_end: bool = False) -> float:
    """`value` as a float; it must be finite and at least `low`, above it with `open_end`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {said(value)}")
    if not (low < value if open_end else low <= value) or value == float("inf"):
        raise ValueError(f"{op}: {name} must be {rule}, got {value!r}")
    return float(value)


def square(op: str, name: str, value: Any, dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64)) -> Tensor:
    """A batch of square matrices, [B, p, p], packed row by row."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {said(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {value.layout}")
    if value.dtype not in dtypes:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {kinds}, got {value.dtype}")
    if value.dim() != 3 or value.shape[1] != value.shape[2]:
        raise ValueError(f"{op}: {name} must have shape (B, p, p), got {tuple(value.shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {value.stride()}")
    return value


def like(op: str, name: str, value: Any, other_name: str, other: Tensor) -> Tensor:
    """Same shape, dtype and device as `other`, contiguous."""
    square(op, name, value, (other.dtype,))
    if value.shape != other.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}"
        )
    same_device(op, name, value, other)
    return value


def same_device(op: str, name: str, value: Tensor, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other.device}, got {value.device}")


def counters(op: str, value: Any, batch: int, other: Tensor) -> None:
    """`failures`: int32 [B] or None."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: failures must be a tensor or None, got {said(value)}")
    if value.dtype != torch.int32:
        raise TypeError(f"{op}: failures must be int32, got {value.dtype}")
    if value.shape != (batch,) or not value.is_contiguous():
        raise ValueError(f"{op}: failures must have shape ({batch},), contiguous, got {tuple(value.shape)}")
    same_device(op, "failures", value, other)


def blocks(op: str, name: str, value: Any) -> list[Tensor]:
    """B matrices of one shape, dtype and device: a list of [m, n] or one tensor [B, m, n]."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got {value.layout}")
        if value.dim() != 3:
            raise ValueError(f"{op}: {name} must have shape (B, m, n), got {tuple(value.shape)}")
        _matrix_dtype(op, name, value)
        return list(value.unbind(0))
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a tensor or a list of tensors, got {said(value)}")
    for i, block in enumerate(value):
        here = f"{name}[{i}]"
        if not isinstance(block, Tensor):
            raise TypeError(f"{op}: {here} must be a tensor, got {said(block)}")
        if block.layout != torch.strided:
            raise TypeError(f"{op}: {here} must be dense, got {block.layout}")
        _matrix_dtype(op, here, block)
        if block.dim() != 2:
            raise ValueError(f"{op}: {here} must have shape (m, n), got {tuple(block.shape)}")
        first = value[0]
        if block.dtype != first.dtype:
            raise TypeError(f"{op}: {here} must have the dtype of {name}[0], {first.dtype}, got {block.dtype}")
        if block.shape != first.shape:
            rule = f"have the shape of {name}[0], {tuple(first.shape)}"
            raise ValueError(f"{op}: {here} must {rule}, got {tuple(block.shape)}")
        same_device(op, here, block, first)
    return list(value)


def _matrix_dtype(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def same_blocks(op: str, name: str, value: list[Tensor], other_name: str, other: list[Tensor]) -> None:
    if len(value) != len(other):
        raise ValueError(f"{op}: {name} must hold as many blocks as {other_name}, {len(other)}, got {len(value)}")
    if value and value[0].shape != other[0].shape:
        rule = f"have blocks of the shape of {other_name}, {tuple(other[0].shape)}"
        raise ValueError(f"{op}: {name} must {rule}, got {tuple(value[0].shape)}")
    if value:
        same_device(op, name, value[0], other[0])
