"""What a row pass takes: from a chunk of logits to its statistics and its logit gradient, in place.

    R rows of the chunk, V vocabulary (entries below vocab_valid only)

Every implementation has the signature of `reference.reference_rows`. One row pass serves one class of divergences
(how many passes over the logits the gradient needs); the divergence itself is one formula in each backend.
"""

from typing import NamedTuple

from torch import Tensor

DIVERGENCES = ("forward_kl",)


class RowOptions(NamedTuple):
    """The scalars of the loss, as the kernels take them."""

    divergence: str = "forward_kl"
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int = -100


class Rows(NamedTuple):
    """The tensors of one chunk; all but the rows of logits and teacher are contiguous.

    A row whose scale is 0 has statistics but no gradient, whatever it holds.
    """

    logits_RV: Tensor
    teacher_RV: Tensor | None
    bias_V: Tensor | None
    labels_R: Tensor
    scale_R: Tensor
    omega_R: Tensor
    stats_SR: Tensor
