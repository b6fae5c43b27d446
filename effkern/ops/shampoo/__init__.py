"""Shampoo's operations on batches of blocks: factors, their inverse roots, and the update."""

from effkern.ops.shampoo.apply import apply_
from effkern.ops.shampoo.gram import gram_ema_
from effkern.ops.shampoo.root import COMPUTED, FAILED, FELL_BACK, ZERO, InverseRoot, inverse_root, matrix_inverse_root

__all__ = [
    "COMPUTED",
    "FAILED",
    "FELL_BACK",
    "ZERO",
    "InverseRoot",
    "apply_",
    "gram_ema_",
    "inverse_root",
    "matrix_inverse_root",
]
