"""A live teacher for transformers' Trainer, as a class to be put before it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effkern.integrations.transformers.heads import causal_model, head_of
from effkern.integrations.transformers.teacher import teacher_hidden


class DistillTrainer:
    """Mix-in: `class MyTrainer(DistillTrainer, transformers.Trainer)`, then `MyTrainer(model=..., teacher=..., ...)`.

    Every training and evaluation batch gets the teacher's hidden states, and the patched student the loss of both.
    Divergence and temperatures are those that the student was patched with. Works with what comes before Trainer in the
    order of classes, too (an SFT trainer). Cached labels need no mix-in: see `patch`.

    Args:
        teacher: a causal language model that `patch` covers. Put into evaluation mode and onto the trainer's device; it
            gets no gradient, and is no part of what is saved.
        omega: weight of the teacher in [0, 1], or a function of the step just done that gives it. At 0 the teacher
            does not run.

    Raises:
        TypeError: `model` was not patched with a distill_loss, or the teacher is no model.
        ValueError: the teacher's architecture, or a vocabulary that does not cover the student's.
    """

    # What Trainer has.
    model: nn.Module
    accelerator: Any
    state: Any

    def __init__(
        self, *args: Any, teacher: nn.Module, omega: float | Callable[[int], float] = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        op = type(self).__name__
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"{op}: teacher must be a model, got {type(teacher).__name__}")
        student: Any = causal_model(op, self.model)
        if "effkern_loss" not in vars(student):
            raise TypeError(f"{op}: model must be patched with a distill_loss, got a plain {type(student).__name__}")
        inner: Any = causal_model(op, teacher)
        head_of(op, inner)
        vocab = student.effkern_loss.loss_fn.options["vocab_valid"] or student.effkern_loss.head.vocab
        rows = inner.get_output_embeddings().weight.shape[0]
        if rows < vocab:
            rule = f"cover the student's {vocab} tokens (patch the student with vocab_valid for another padding)"
            raise ValueError(f"{op}: the vocabulary of teacher must {rule}, got {rows}")
        self.omega = omega
        # Not through accelerate: a wrapped forward would not be used.
        self.teacher = teacher.eval().requires_grad_(False).to(self.accelerator.device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the teacher's rows among the inputs."""
        omega = self.omega(self.state.global_step) if callable(self.omega) else self.omega
        if omega != 0:
            seen = {name: value for name, value in inputs.items() if name in _SEEN}
            with torch.no_grad(), self.accelerator.autocast():
                inputs = {**inputs, "teacher": teacher_hidden(self.teacher, **seen), "omega": omega}
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


# What a teacher reads of the student's inputs.
_SEEN = ("input_ids", "attention_mask", "position_ids")
