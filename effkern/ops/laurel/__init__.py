"""The LAuReL residual."""

from effkern.ops.laurel.api import LaurelOutput, laurel_residual

__all__ = ["LaurelOutput", "laurel_residual"]
