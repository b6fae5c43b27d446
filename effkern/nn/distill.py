"""`LinearDistillLoss`: the options of `linear_distill_loss` as a module."""

from typing import Any

from torch import Tensor, nn

from effkern.ops.distill import DistillResult, TeacherHidden, TeacherLogits, checks, linear_distill_loss


class LinearDistillLoss(nn.Module):
    """Cross entropy mixed with distillation, from hidden states; see `effkern.linear_distill_loss`.

    The module keeps the options that stay the same over a training run; tensors, the teacher and what a schedule
    changes (omega, denom) come with each call.

    Args:
        temperature, teacher_temperature: T and T' of the distillation term, > 0; needed as soon as a teacher comes.
        options: any other keyword of `linear_distill_loss` but `teacher`, `omega`, `bias`, `weights` and `denom`.

    Raises:
        TypeError, ValueError: an unknown option, or one that breaks its rule; said here, not at the first call.
    """

    OPTIONS = frozenset(
        ("divergence", "alpha", "beta", "t_squared", "normalize_jsd", "ignore_index", "label_smoothing", "z_loss",
         "softcap", "logit_scale", "vocab_valid", "reduction", "check", "impl", "chunk_bytes")
    )  # fmt: skip

    def __init__(
        self, *, temperature: float | None = None, teacher_temperature: float | None = None, **options: Any
    ) -> None:
        super().__init__()
        unknown = sorted(set(options) - self.OPTIONS)
        if unknown:
            raise TypeError(f"LinearDistillLoss: options must be among {sorted(self.OPTIONS)}, got {unknown}")
        rules = {k: v for k, v in options.items() if k not in ("vocab_valid", "check", "impl")}
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
        teacher: TeacherLogits | TeacherHidden | None = None,
        omega: float | Tensor | None = None,
        bias: Tensor | None = None,
        weights: Tensor | None = None,
        denom: float | Tensor | None = None,
    ) -> DistillResult:
        """Loss and per-token statistics. Leading dimensions of every argument are flattened to N tokens.

        Raises ValueError if the teacher's logits cannot be flattened without a copy: shift the labels, not the logits.
        """
        if isinstance(teacher, TeacherLogits) and teacher.logits.dim() > 2:
            teacher = TeacherLogits(_flat_view(teacher.logits))
        if isinstance(teacher, TeacherHidden) and teacher.hidden.dim() > 2:
            flat = teacher.hidden.reshape(-1, teacher.hidden.shape[-1])
            teacher = TeacherHidden(flat, teacher.weight, teacher.bias, teacher.softcap, teacher.logit_scale)
        if isinstance(omega, Tensor) and omega.dim() > 1:
            omega = omega.reshape(-1)
        return linear_distill_loss(
            hidden.reshape(-1, hidden.shape[-1]) if hidden.dim() > 2 else hidden,
            weight,
            labels.reshape(-1) if labels.dim() > 1 else labels,
            teacher=teacher,
            omega=omega,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            bias=bias,
            weights=weights.reshape(-1) if weights is not None and weights.dim() > 1 else weights,
            denom=denom,
            **self.options,
        )

    def extra_repr(self) -> str:
        pairs = {"temperature": self.temperature, "teacher_temperature": self.teacher_temperature, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in pairs.items())


def _flat_view(logits: Tensor) -> Tensor:
    """[..., V] as [N, V] without a copy, which would be N x V."""
    try:
        return logits.view(-1, logits.shape[-1])
    except RuntimeError:
        strides = list(logits.stride())
        raise ValueError(
            "LinearDistillLoss: teacher.logits must flatten to [N, V] without a copy (shift the labels, not the "
            f"logits), got shape {list(logits.shape)} with strides {strides}"
        ) from None
