"""Optimizers of LoRA pairs."""

from effkern.optim.lora.base import LoraOptimizer
from effkern.optim.lora.pairs import LoraPair, find_pairs
from effkern.optim.lora.rite import LoRARite

__all__ = ["LoRARite", "LoraOptimizer", "LoraPair", "find_pairs"]
