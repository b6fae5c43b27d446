"""Optimizers over the ops."""

from effkern.optim.lora import LoraOptimizer, LoraPair, LoRARite, find_pairs

__all__ = ["LoRARite", "LoraOptimizer", "LoraPair", "find_pairs"]
