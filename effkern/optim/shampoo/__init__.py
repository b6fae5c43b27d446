"""Shampoo, one-sided and two-sided."""

from effkern.optim.shampoo.groups import describe, parameter_groups
from effkern.optim.shampoo.optimizer import Shampoo
from effkern.optim.shampoo.presets import OneSidedShampoo

__all__ = ["OneSidedShampoo", "Shampoo", "describe", "parameter_groups"]
