"""What a row pass takes: from a chunk of logits to its statistics and its logit gradient, in place.

    R rows of the chunk, V vocabulary (entries below vocab_valid only), K entries of a sparse teacher

Every implementation has the signature of `reference.reference_rows`. One row pass serves one class of divergences
(how many passes over the logits the gradient needs); the divergence itself is one formula in each backend.
"""

from typing import NamedTuple

from torch import Tensor


class Divergence(NamedTuple):
    """What the public function has to know about a divergence; its formulas are in each backend."""

    parameters: tuple[str, ...]
    """Those of alpha and beta that it needs."""
    passes: int
    """Over the row: one for statistics, one for the gradient, and one in between where it needs normalised p and q."""
    tempered: bool = True
    """False: defined on the logits themselves, at temperature 1."""


# The order is that of the C++ table.
DIVERGENCES = {
    "forward_kl": Divergence((), 2),
    "reverse_kl": Divergence((), 2),
    "symmetric_kl": Divergence(("beta",), 2),
    "jsd": Divergence(("beta",), 3),
    "skew_forward_kl": Divergence(("alpha",), 3),
    "skew_reverse_kl": Divergence(("alpha",), 3),
    "tvd": Divergence((), 3),
    "decoupled_kl": Divergence(("alpha", "beta"), 2),
    "mse": Divergence((), 2, tempered=False),
    "centered_mse": Divergence((), 2, tempered=False),
    "zscored_mse": Divergence((), 2, tempered=False),
    "cosine": Divergence((), 2, tempered=False),
}

# What a sparse teacher's kept entries say of the rest (types.TeacherTopK). The order is that of the C++ table.
SPARSE_KINDS = (
    "truncated",
    "renormalized",
    "both_renormalized",
    "tail_bucket",
    "tail_to_label",
    "uniform_tail",
    "sampled",
    "stratified",
)

# Smallest mass of either model outside the kept entries of a tail bucket, whose logarithm is taken.
TAIL_FLOOR = 1e-7


class RowOptions(NamedTuple):
    """The scalars of the loss, as the kernels take them."""

    divergence: str = "forward_kl"
    alpha: float = 0.0
    beta: float = 0.0
    divergence_scale: float = 1.0
    """Factor of the divergence: T^2, or what normalises a JSD."""
    teacher: str = "logits"
    """What the teacher's rows are: "logits", "logprobs" (taken as they are, whatever their mass), or one of
    SPARSE_KINDS; without a teacher it means nothing."""
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int = -100


class Rows(NamedTuple):
    """The tensors of one chunk; all but the rows of logits and teacher are contiguous.

    A row whose scale is 0 has statistics but no gradient, whatever it holds. A teacher has either `teacher_RV` or
    `ids_RK` with `logprobs_RK`; an id outside of [0, V) is an empty slot.
    """

    logits_RV: Tensor
    teacher_RV: Tensor | None
    ids_RK: Tensor | None
    logprobs_RK: Tensor | None
    bias_V: Tensor | None
    labels_R: Tensor
    scale_R: Tensor
    omega_R: Tensor
    stats_SR: Tensor
