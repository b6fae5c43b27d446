"""A live teacher for transformers' Trainer, as a class to be put before it."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effkern.integrations.transformers.fused_loss import model_forward
from effkern.integrations.transformers.heads import causal_model, head_of
from effkern.integrations.transformers.swap import runs_swapped
from effkern.integrations.transformers.teacher import teacher_hidden


class DistillTrainer:
    """Mix-in: `class MyTrainer(DistillTrainer, transformers.Trainer)`, then `MyTrainer(model=..., teacher=..., ...)`.

    Every training and evaluation batch gets the teacher's hidden states, and the patched student the loss of both.
    Divergence, temperatures and smoothing are those that the student was patched with. Works with what comes before
    Trainer in the order of classes, too (an SFT trainer). Cached labels need no mix-in: see `patch`.

    Args:
        teacher: a causal language model that `patch` covers. Put into evaluation mode and onto the trainer's device; it
            gets no gradient, and is no part of what is saved.
        omega: weight of the teacher in [0, 1], or a function of the step just done that gives it. At 0 the teacher
            does not run.

    Raises:
        TypeError: `model` was not patched with a distill_loss, or the teacher is no model.
        ValueError: the teacher's architecture, a vocabulary that does not cover the student's, or training arguments
            under which the student's loss would not be the patched one (use_liger_kernel, label_smoothing_factor,
            several GPUs in one process).
        RuntimeError: in training, something else has replaced the patched forward since.
    """

    # What Trainer has.
    model: nn.Module
    args: Any
    accelerator: Any
    state: Any

    def __init__(
        self, *args: Any, teacher: nn.Module, omega: float | Callable[[int], float] = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        op = type(self).__name__
        _check_arguments(op, self.args)
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
        _require_patched(type(self).__name__, model)
        omega = self.omega(self.state.global_step) if callable(self.omega) else self.omega
        if omega != 0:
            seen = {name: value for name, value in inputs.items() if name in _SEEN}
            with torch.no_grad(), self.accelerator.autocast():
                inputs = {**inputs, "teacher": teacher_hidden(self.teacher, **seen), "omega": omega}
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


def _check_arguments(op: str, args: Any) -> None:
    """
    Raises:
        ValueError: the student's patched loss would not be what trains.
    """
    if getattr(args, "use_liger_kernel", False):
        raise ValueError(f"{op}: use_liger_kernel must be False, as Liger's forward takes no teacher, got True")
    if args.label_smoothing_factor:
        rule = "be 0, as the Trainer's smoothing takes the labels away (patch the model with label_smoothing)"
        raise ValueError(f"{op}: label_smoothing_factor must {rule}, got {args.label_smoothing_factor}")
    if args.n_gpu > 1:
        rule = "be 1: nn.DataParallel cannot split a teacher's rows (start one process per GPU with torchrun)"
        raise ValueError(f"{op}: the GPUs of a process must {rule}, got n_gpu={args.n_gpu}")


def _require_patched(op: str, model: nn.Module) -> None:
    """
    Raises:
        RuntimeError: no forward of patch is what a call of `model`, wrapped or not, runs.
    """
    student = next((module for module in model.modules() if "effkern_loss" in vars(module)), None)
    if student is None or not runs_swapped(student, model_forward):
        forward = inspect.unwrap(vars(student if student is not None else model).get("forward", type(model).forward))
        rule = "run the forward of patch (patch last, and nothing over it)"
        raise RuntimeError(f"{op}: the model must {rule}, got one of {getattr(forward, '__module__', None)}")


# What a teacher reads of the student's inputs.
_SEEN = ("input_ids", "attention_mask", "position_ids")
