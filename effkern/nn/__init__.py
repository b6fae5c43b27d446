"""Modules over the ops."""

from effkern.nn.distill import LinearDistillLoss

__all__ = ["LinearDistillLoss"]
