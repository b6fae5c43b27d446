"""The squared-ReLU gate of an MLP: relu(gate)^2 times up."""

from effkern.ops.op_name.api import op_name

__all__ = ["op_name"]
