"""Optimizers of LoRA pairs."""

from effkern.optim.lora.base import LoraOptimizer
from effkern.optim.lora.pairs import LoraPair, find_pairs
from effkern.optim.lora.peers import LoRAMuon, ScaledAdam
from effkern.optim.lora.port import import_port_state
from effkern.optim.lora.rite import LoRARite

__all__ = ["LoRAMuon", "LoRARite", "LoraOptimizer", "LoraPair", "ScaledAdam", "find_pairs", "import_port_state"]
