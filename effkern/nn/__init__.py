"""Modules over the ops."""

from effkern.nn.distill import LinearDistillLoss
from effkern.nn.laurel import LaurelResidual

__all__ = ["LaurelResidual", "LinearDistillLoss"]
