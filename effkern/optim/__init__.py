"""Optimizers over the ops. Each is imported when it is first asked for."""

from importlib import import_module
from typing import Any

_HOMES = {
    "LoRAMuon": "effkern.optim.lora",
    "LoRARite": "effkern.optim.lora",
    "LoraOptimizer": "effkern.optim.lora",
    "LoraPair": "effkern.optim.lora",
    "OneSidedShampoo": "effkern.optim.shampoo",
    "ScaledAdam": "effkern.optim.lora",
    "Shampoo": "effkern.optim.shampoo",
    "find_pairs": "effkern.optim.lora",
}

__all__ = [
    "LoRAMuon",
    "LoRARite",
    "LoraOptimizer",
    "LoraPair",
    "OneSidedShampoo",
    "ScaledAdam",
    "Shampoo",
    "find_pairs",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "structured":
        return import_module("effkern.optim.structured")
    raise AttributeError(f"module 'effkern.optim' has no attribute {name!r}")
