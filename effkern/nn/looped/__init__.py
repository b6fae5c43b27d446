"""A block applied many times: LoopedBlock, its execution modes, numbers of loops, and the gate that ends them."""

from effkern.nn.looped.block import LoopedBlock, LoopState
from effkern.nn.looped.modes import Implicit, Truncated
from effkern.nn.looped.sampling import PoissonLognormalLoops, UniformLoops

__all__ = ["Implicit", "LoopState", "LoopedBlock", "PoissonLognormalLoops", "Truncated", "UniformLoops"]
