"""Modules over the ops."""

from effkern.nn.distill import LinearDistillLoss
from effkern.nn.laurel import LaurelResidual
from effkern.nn.looped import (
    ExitDistribution,
    ExitGate,
    GraphedLoops,
    Implicit,
    LoopedBlock,
    LoopState,
    PoissonLognormalLoops,
    Truncated,
    UniformLoops,
    exit_gate_loss,
    exit_log_probs,
    expected_exit_loss,
)

__all__ = [
    "ExitDistribution",
    "ExitGate",
    "GraphedLoops",
    "Implicit",
    "LaurelResidual",
    "LinearDistillLoss",
    "LoopState",
    "LoopedBlock",
    "PoissonLognormalLoops",
    "Truncated",
    "UniformLoops",
    "exit_gate_loss",
    "exit_log_probs",
    "expected_exit_loss",
]
