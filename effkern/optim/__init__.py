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
    "Together": "effkern.optim.together",
    "create": "effkern.optim.factory",
    "describe": "effkern.optim.grouping",
    "find_pairs": "effkern.optim.lora",
    "parameter_groups": "effkern.optim.grouping",
    "roles": "effkern.optim.grouping",
}

__all__ = [
    "LoRAMuon",
    "LoRARite",
    "LoraOptimizer",
    "LoraPair",
    "OneSidedShampoo",
    "ScaledAdam",
    "Shampoo",
    "Together",
    "create",
    "describe",
    "find_pairs",
    "parameter_groups",
    "roles",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "structured":
        return import_module("effkern.optim.structured")
    raise AttributeError(f"module 'effkern.optim' has no attribute {name!r}")
