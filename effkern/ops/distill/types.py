"""What goes into the loss (teachers) and what comes out (result, per-token statistics)."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher given by its logits.

    Args:
        logits: shape [N, Vt], Vt >= vocab_valid, float32/float16/bfloat16 (float64 with a float64 student),
            stride 1 along Vt. Scale and softcap, if the teacher has them, are already applied. -inf masks an
            entry (probability zero). Gets no gradient.
    """

    logits: Tensor


@dataclass(frozen=True)
class TeacherHidden:
    """A teacher given by its last hidden states and its output layer: u = softcap(scale (hidden weight^T + bias)).

    Its logits exist one chunk of rows at a time, in float32. The hidden size may differ from the student's.

    Args:
        hidden: shape [N, dt].
        weight: shape [Vt, dt], Vt >= vocab_valid, same dtype as `hidden`.
        bias: shape [Vt] or None.
        softcap: c > 0 for u -> c tanh(u / c), or None.
        logit_scale: factor on the logits before the softcap.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


Teacher = TeacherLogits | TeacherHidden


class DistillStats(NamedTuple):
    """Per-token statistics, each float32 [N] (float64 for float64 inputs), in nats where it applies, without gradient.

    Ignored rows hold exact zeros. Teacher fields are zero without a teacher. q = softmax(z / T), p = softmax(u / T').
    """

    loss: Tensor
    """(1 - omega) * (smoothed) CE + omega * divergence + z_loss * lse^2, before weights and denominator."""
    ce: Tensor
    """lse(z) - z_y at temperature 1, without label smoothing."""
    divergence: Tensor
    """D(p || q)."""
    lse: Tensor
    """log sum exp z at temperature 1."""
    teacher_lse: Tensor
    """log sum exp (u / T')."""
    label_logprob: Tensor
    """log q_y."""
    teacher_label_logprob: Tensor
    """log p_y."""
    entropy: Tensor
    """-sum q log q."""
    teacher_entropy: Tensor
    """-sum p log p."""
    hit: Tensor
    """1 where the label has the student's largest logit (ties count), else 0."""
    teacher_hit: Tensor
    """The same for the teacher."""


class DistillResult(NamedTuple):
    """loss: 0-d, or [N] with reduction="none"; stats: per-token statistics."""

    loss: Tensor
    stats: DistillStats
