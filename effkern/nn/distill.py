"""`LinearDistillLoss`: the options of `linear_distill_loss` as a module."""

from typing import Any

from torch import Tensor, nn

from effkern.ops.distill import DistillResult, TeacherHidden, TeacherLogits, linear_distill_loss


class LinearDistillLoss(nn.Module):
    """Cross entropy mixed with distillation, from hidden states; see `effkern.linear_distill_loss`.

    The module keeps the options that stay the same over a training run; tensors, the teacher and what a schedule
    changes (omega, denom) come with each call.

    Args:
        temperature, teacher_temperature: T and T' of the distillation term, > 0.
        options: any other keyword of `linear_distill_loss` but `teacher`, `omega`, `bias`, `weights` and `denom`.

    Raises:
        TypeError: an unknown option.
    """

    OPTIONS = frozenset(
        ("divergence", "ignore_index", "label_smoothing", "z_loss", "softcap", "logit_scale", "vocab_valid",
         "reduction", "impl", "chunk_bytes")
    )  # fmt: skip

    def __init__(self, *, temperature: float = 1.0, teacher_temperature: float = 1.0, **options: Any) -> None:
        super().__init__()
        unknown = sorted(set(options) - self.OPTIONS)
        if unknown:
            raise TypeError(f"LinearDistillLoss: options must be among {sorted(self.OPTIONS)}, got {unknown}")
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
        """Loss and per-token statistics. hidden [..., D] and labels [...] are flattened to N tokens."""
        dim = hidden.shape[-1]
        if isinstance(teacher, TeacherLogits) and teacher.logits.dim() > 2:
            teacher = TeacherLogits(teacher.logits.flatten(0, -2))
        if isinstance(teacher, TeacherHidden) and teacher.hidden.dim() > 2:
            flat = teacher.hidden.reshape(-1, teacher.hidden.shape[-1])
            teacher = TeacherHidden(flat, teacher.weight, teacher.bias, teacher.softcap, teacher.logit_scale)
        return linear_distill_loss(
            hidden.reshape(-1, dim),
            weight,
            labels.reshape(-1),
            teacher=teacher,
            omega=omega,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            bias=bias,
            weights=None if weights is None else weights.reshape(-1),
            denom=denom,
            **self.options,
        )

    def extra_repr(self) -> str:
        pairs = {"temperature": self.temperature, "teacher_temperature": self.teacher_temperature, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in pairs.items())
