"""A block applied many times: LoopedBlock, its execution modes, numbers of loops, and the gate that ends them."""

from effkern.nn.looped.block import LoopedBlock
from effkern.nn.looped.gate import ExitDistribution, ExitGate, exit_gate_loss, exit_log_probs, expected_exit_loss
from effkern.nn.looped.graph import GraphedLoops
from effkern.nn.looped.modes import Implicit, Truncated
from effkern.nn.looped.sampling import PoissonLognormalLoops, UniformLoops
from effkern.nn.looped.state import LoopState

__all__ = [
    "ExitDistribution",
    "ExitGate",
    "GraphedLoops",
    "Implicit",
    "LoopState",
    "LoopedBlock",
    "PoissonLognormalLoops",
    "Truncated",
    "UniformLoops",
    "exit_gate_loss",
    "exit_log_probs",
    "expected_exit_loss",
]
