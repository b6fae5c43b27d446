"""Optimizers over the ops. Each is imported when it is first asked for."""

from importlib import import_module
from typing import Any

_HOMES = {
    "OneSidedShampoo": "effkern.optim.shampoo",
    "Shampoo": "effkern.optim.shampoo",
}

__all__ = ["OneSidedShampoo", "Shampoo"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "structured":
        return import_module("effkern.optim.structured")
    raise AttributeError(f"module 'effkern.optim' has no attribute {name!r}")
