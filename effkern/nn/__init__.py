"""Modules over the ops."""

from effkern.nn.distill import LinearDistillLoss
from effkern.nn.laurel import LaurelResidual
from effkern.nn.looped import Implicit, LoopedBlock, LoopState, PoissonLognormalLoops, Truncated, UniformLoops

__all__ = [
    "Implicit",
    "LaurelResidual",
    "LinearDistillLoss",
    "LoopState",
    "LoopedBlock",
    "PoissonLognormalLoops",
    "Truncated",
    "UniformLoops",
]
