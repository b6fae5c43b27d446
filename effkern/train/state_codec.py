"""Nested Python state (an optimizer's state_dict) as named tensors plus JSON, exactly, without pickle.

Tensors go to a flat dictionary; lists, tuples, dictionaries with any scalar keys, numbers, strings, booleans and
None go to JSON. decode(encode(x)) == x with the same types.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON form of `value`; its tensors are added to `tensors` under names that begin with `name`.

    Raises:
        TypeError: a value of any other type; the message names the place.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, encode(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [encode(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(
        f"encode: {name} must be a tensor, number, string, bool, None, list, tuple or dict, got {type(value).__name__}"
    )


def decode(form: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `encode`. Tensors are copied, so that none stays a view of a mapped file."""
    ((kind, body),) = form.items()
    if kind == "tensor":
        return torch.clone(tensors[body])
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in body}
    if kind == "value":
        return body
    items = [decode(item, tensors) for item in body]
    return items if kind == "list" else tuple(items)
