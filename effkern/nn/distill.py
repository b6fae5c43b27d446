"""`LinearDistillLoss`: the options of `linear_distill_loss` as a module."""

from typing import Any

from torch import Tensor, nn

from effkern.ops.distill import (
    DistillResult,
    TeacherConfidence,
    TeacherHidden,
    TeacherLogits,
    TeacherLogProbs,
    TeacherSimilarity,
    TeacherTopK,
    checks,
    linear_distill_loss,
)
from effkern.ops.distill.types import Teacher


class LinearDistillLoss(nn.Module):
    """Cross entropy mixed with distillation, from hidden states; see `effkern.linear_distill_loss`.

    The module keeps the options that stay the same over a training run; tensors, the teacher and what a schedule
    changes (omega, denom) come with each call.

    Args:
        temperature, teacher_temperature: T and T' of the distillation term, > 0; needed as soon as a teacher comes.
        options: any other keyword of `linear_distill_loss`, among them divergence, alpha and beta, that is not one of
            `forward`.

    Raises:
        TypeError, ValueError: an unknown option, or a number of the formula that breaks its rule; said here, not at the
            first call.
    """

    OPTIONS = frozenset(
        ("divergence", "alpha", "beta", "t_squared", "normalize_jsd", "ignore_index", "label_smoothing", "z_loss",
         "softcap", "logit_scale", "vocab_valid", "reduction", "check", "impl", "chunk_bytes", "memory_limit")
    )  # fmt: skip

    def __init__(
        self, *, temperature: float | None = None, teacher_temperature: float | None = None, **options: Any
    ) -> None:
        super().__init__()
        unknown = sorted(set(options) - self.OPTIONS)
        if unknown:
            raise TypeError(f"LinearDistillLoss: options must be among {sorted(self.OPTIONS)}, got {unknown}")
        rules = {k: v for k, v in options.items() if k not in ("vocab_valid", "check", "impl", "memory_limit")}
        checks.check_options(temperature=temperature, teacher_temperature=teacher_temperature, **rules)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.options = options

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        teacher: Teacher | None = None,
        omega: float | Tensor | None = None,
        bias: Tensor | None = None,
        weights: Tensor | None = None,
        denom: float | Tensor | None = None,
        num_kept: int | None = None,
        weight_grad: Tensor | None = None,
    ) -> DistillResult:
        """Loss and per-token statistics. Leading dimensions of every argument are flattened to N tokens.

        Those of a teacher's logits, log-probabilities, hidden states, ids and confidences are flattened with them.
        Raises ValueError if a V-wide teacher cannot be flattened without a copy: shift the labels, not the logits.
        """
        for name, x in (("labels", labels), ("omega", omega), ("weights", weights)):
            _same_leading(name, x, 0, hidden)
        for name, trailing in _TRAILING.items():
            _same_leading(f"teacher.{name}", getattr(teacher, name, None), trailing, hidden)
        return linear_distill_loss(
            _flat_rows(hidden),
            weight,
            _flat(labels),
            teacher=_flat_teacher(teacher),
            omega=_flat(omega),
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            bias=bias,
            weights=_flat(weights),
            denom=denom,
            num_kept=num_kept,
            weight_grad=weight_grad,
            **self.options,
        )

    def extra_repr(self) -> str:
        pairs = {"temperature": self.temperature, "teacher_temperature": self.teacher_temperature, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in pairs.items())


# Dimensions of a teacher's tensors after those of the tokens.
_TRAILING = {"logits": 1, "hidden": 1, "ids": 1, "logprobs": 1, "lse": 0, "prob": 0}


def _same_leading(name: str, x: Any, trailing: int, hidden: Tensor) -> None:
    """Tokens that are spread over several dimensions must be so in the same way, or they would be paired wrongly."""
    if not isinstance(x, Tensor) or not isinstance(hidden, Tensor):
        return
    leading = x.shape[: x.dim() - trailing]
    if len(leading) > 1 and leading != hidden.shape[:-1]:
        got, want = list(leading), list(hidden.shape[:-1])
        raise ValueError(f"LinearDistillLoss: {name} must have the leading dimensions of hidden, {want}, got {got}")


def _flat_teacher(teacher: Any) -> Any:
    """The teacher with its leading dimensions in one; what is no teacher is left for the op to refuse."""
    t = teacher
    if isinstance(t, TeacherLogits):
        return TeacherLogits(_flat_view("logits", t.logits))
    if isinstance(t, TeacherLogProbs):
        return TeacherLogProbs(_flat_view("logprobs", t.logprobs))
    if isinstance(t, TeacherHidden):
        return TeacherHidden(_flat_rows(t.hidden), t.weight, t.bias, t.softcap, t.logit_scale)
    if isinstance(t, TeacherTopK):
        return TeacherTopK(_flat_rows(t.ids), _flat_rows(t.logprobs), t.kind, _flat(t.lse))
    if isinstance(t, TeacherConfidence):
        return TeacherConfidence(_flat(t.prob))
    if isinstance(t, TeacherSimilarity):
        return TeacherSimilarity(t.table, _flat(t.prob))
    return t


def _flat(x: Any) -> Any:
    return x.reshape(-1) if isinstance(x, Tensor) and x.dim() > 1 else x


def _flat_rows(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1]) if isinstance(x, Tensor) and x.dim() > 2 else x


def _flat_view(name: str, x: Any) -> Any:
    """[..., V] as [N, V] without a copy, which would be N x V."""
    if not isinstance(x, Tensor) or x.dim() <= 2:
        return x
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        strides = list(x.stride())
        raise ValueError(
            f"LinearDistillLoss: teacher.{name} must flatten to [N, V] without a copy (shift the labels, not the "
            f"logits), got shape {list(x.shape)} with strides {strides}"
        ) from None
