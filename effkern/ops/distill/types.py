"""What goes into the loss (teachers) and what comes out (result, per-token statistics)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
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


@dataclass(frozen=True)
class TeacherLogProbs:
    """A teacher given by its log-probabilities, as inference servers return them.

    At teacher_temperature 1 they are taken as they are: p = exp(logprobs), whose sum S need not be 1 (entries that
    were cut away are -inf). The gradient of the forward KL is then S q - p. At another temperature, and in
    "decoupled_kl", they are logits: p = softmax(logprobs / T').

    Args:
        logprobs: shape [N, Vt], as `TeacherLogits.logits`.
    """

    logprobs: Tensor


@dataclass(frozen=True)
class TeacherTopK:
    """A sparse teacher: K entries of the vocabulary per row. Nothing V-wide is made of it.

    t_k = exp(logprobs_k), kept set K, S = sum_k t_k. What is assumed of the rest, by `kind`, and the gradient of the
    forward KL with respect to z / T, for i in K and for i outside:

    - "truncated": nothing; the target has mass S.              S q_i - t_i,      S q_i
    - "renormalized": nothing; target t / S.                    q_i - t_i / S,    q_i
    - "both_renormalized": student too: q / sum_K q.            q_i / Q - t_i / S, 0
    - "tail_bucket": one more cell, 1 - S against 1 - Q.        q_i - t_i,        q_i (S - Q) / (1 - Q)
    - "tail_to_label": the mass 1 - S belongs to the label.     q - t,            q - (1 - S) e_y
    - "uniform_tail": it is spread evenly (KD-topk).            q_i - t_i,        q_i - (1 - S) / (V - K)
    - "sampled", "stratified": t is an unbiased estimate of the teacher, counts / draws, or the exact head and
      (1 - S) / draws for each draw of the tail; the same formulas as "truncated".

    "tail_bucket" also serves the reverse KL. Masses of tail buckets are held at 1e-7 or more.

    Args:
        ids: shape [N, K], int64 or int32, contiguous. An id outside of [0, vocab_valid) is an empty slot, by
            convention -1. Ids of one row are distinct; the contributions of a repeated one add up.
        logprobs: shape [N, K], float32, float16 or bfloat16 (float64 with float64): log t. With a teacher_temperature
            other than 1 (the renormalized kinds alone, where the rest does not matter) they are divided by it.
        kind: see above.
        lse: shape [N] or None. Given: `logprobs` are logits of the teacher, and log t = logprobs - lse.
    """

    ids: Tensor
    logprobs: Tensor
    kind: str
    lse: Tensor | None = None

    @classmethod
    def from_counts(cls, ids: Tensor, counts: Tensor, draws: int | Tensor) -> "TeacherTopK":
        """Labels sampled with replacement: t = counts / draws; a count of 0 is an empty slot. `draws` may be [N]."""
        share = counts.float() / (draws[:, None] if isinstance(draws, Tensor) and draws.dim() == 1 else draws)
        return cls(torch.where(counts > 0, ids, -1), share.log(), "sampled")

    @classmethod
    def from_logits(
        cls, logits: Tensor, k: int, *, kind: str = "uniform_tail", temperature: float = 1.0
    ) -> "TeacherTopK":
        """The k largest entries of softmax(logits / temperature): KD-topk with the default kind."""
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        values, ids = scaled.topk(k, dim=-1)
        return cls(ids, values - scaled.logsumexp(-1, keepdim=True), kind)


@dataclass(frozen=True)
class TeacherConfidence:
    """A teacher of whom only the confidence in the label is used (KD-pt): rho_y = p_y, rho_i = (1 - p_y) / (V - 1).

    Args:
        prob: p_y, shape [N], in [0, 1], at the temperature it is meant at.
    """

    prob: Tensor


@dataclass(frozen=True)
class TeacherSimilarity:
    """A teacher of whom only the relations between classes are used (KD-sim): row y of a shared table is the target.

    rho = softmax(table_y); with confidences p_y (KD-pt+sim): rho_y = p_y, the rest shares 1 - p_y in the proportions
    of the table's row. Meant for class vocabularies, where V x V is small.

    Args:
        table: shape [V, V] logits of rho, row by label.
        prob: p_y, shape [N], in [0, 1], or None.
    """

    table: Tensor
    prob: Tensor | None = None

    @staticmethod
    def table_of(weight: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
        """The table of a teacher's output layer [V, D]: ((w_t . w_i) / alpha)^beta of its normalised rows.

        A negative similarity keeps its sign: sign(s) |s|^beta. Source: Tang et al., arXiv 2002.03532 (KD-sim); the
        place of beta is the least certain part of it.
        """
        unit = torch.nn.functional.normalize(weight.float(), dim=-1)
        similarity = unit @ unit.t() / alpha
        return similarity.sign() * similarity.abs() ** beta


Teacher = TeacherLogits | TeacherHidden | TeacherLogProbs | TeacherTopK | TeacherConfidence | TeacherSimilarity


class DistillStats(NamedTuple):
    """Per-token statistics, each float32 [N] (float64 for float64 inputs), in nats where it applies, without gradient.

    Ignored rows hold exact zeros. Teacher fields are zero without a teacher. q = softmax(z / T), p = softmax(u / T').
    """

    loss: Tensor
    """(1 - omega) * (smoothed) CE + omega * divergence + z_loss * lse^2, before weights and denominator."""
    ce: Tensor
    """lse(z) - z_y at temperature 1, without label smoothing."""
    divergence: Tensor
    """D(p, q), with its factor (T^2, normalised JSD) if one was asked for."""
    lse: Tensor
    """log sum exp z at temperature 1."""
    teacher_lse: Tensor
    """log sum exp (u / T'); of log-probabilities taken as they are, and of a sparse teacher: log S."""
    label_logprob: Tensor
    """log q_y."""
    teacher_label_logprob: Tensor
    """log p_y; of a sparse teacher: log of what its kind gives the label, -inf if nothing."""
    entropy: Tensor
    """-sum q log q."""
    teacher_entropy: Tensor
    """-sum p log p; of a sparse teacher: of the target that its kind describes."""
    hit: Tensor
    """1 where the label has the student's largest logit (ties count), else 0."""
    teacher_hit: Tensor
    """The same for the teacher; of a sparse one: the label is the largest of the kept entries."""
    gradient_ratio: Tensor
    """omega_t of Tang et al.: gradient of (1 - omega) CE + omega D on the label's logit over that of CE alone,
    (1 - omega) + omega (dD / dz_y) / (q_y - 1), q at temperature 1; 1 - omega where q_y = 1."""
    agreement: Tensor
    """1 where an entry has the largest logit of both models, else 0."""


class DistillResult(NamedTuple):
    """loss: 0-d, or [N] with reduction="none"; stats: per-token statistics."""

    loss: Tensor
    stats: DistillStats
