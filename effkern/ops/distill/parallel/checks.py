"""Argument checks of the loss over slices of the vocabulary; options alone are checked as for the whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from effkern.ops.distill import checks, values
from effkern.ops.distill.arguments import OP as WHOLE
from effkern.ops.distill.check_teachers import check_teacher
from effkern.ops.distill.parallel import agree
from effkern.ops.distill.parallel.agree import OP
from effkern.ops.distill.parallel.chunks import Layout
from effkern.ops.distill.rows import RowOptions
from effkern.ops.distill.teachers import Source
from effkern.ops.distill.types import Teacher, TeacherConfidence, TeacherSimilarity


@contextmanager
def under_own_name() -> Iterator[None]:
    """The checks of the whole loss speak of this one."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as caught:
        raise type(caught)(str(caught).replace(f"{WHOLE}:", f"{OP}:", 1)) from None


def check_arguments(
    hidden: Any, weight: Any, labels: Any, bias: Any, weights: Any, weight_grad: Any, teacher: Any, omega: Any,
    denom: Any, num_kept: Any, options: dict[str, Any], row_shards: int,
) -> None:  # fmt: skip
    """What this rank can judge alone; `row_shards`: number of ranks that the rows of `hidden` are spread over."""
    if not isinstance(hidden, Tensor):
        checks.fail(TypeError, "hidden", "be a tensor", type(hidden).__name__)
    device = hidden.device
    checks.tensor("hidden", hidden, (None, None), device)
    checks.tensor("weight", weight, (None, hidden.shape[1]), device)
    if hidden.shape[1] == 0:
        checks.fail(ValueError, "hidden", "have at least one column", f"shape {list(hidden.shape)}")
    checks.same_dtype("weight", weight, "hidden", hidden)
    checks.tensor("labels", labels, (hidden.shape[0] * row_shards,), device, (torch.int64, torch.int32))
    if bias is not None:
        checks.tensor("bias", bias, (weight.shape[0],), device)
    if weights is not None:
        checks.tensor("weights", weights, (labels.shape[0],), device)
    divergence, t_teacher = options["divergence"], options["teacher_temperature"]
    whole_rows = labels[:, None]
    if teacher is not None and not isinstance(teacher, (TeacherConfidence, TeacherSimilarity)):
        # A slice may be small: what is said of the whole vocabulary is checked once that is known.
        judged = "forward_kl" if divergence == "decoupled_kl" and not hasattr(teacher, "ids") else divergence
        check_teacher(teacher, whole_rows, 0, judged, t_teacher)
    checks.check_mixture(
        teacher, divergence, omega, options["temperature"], t_teacher, options["reduction"], denom, whole_rows
    )
    checks.check_extras(weight, num_kept, weight_grad, options["reduction"])


def check_whole(teacher: Teacher | None, labels: Tensor, divergence: str, t_teacher: float | None, vocab: int) -> None:
    """What needs the size of the whole vocabulary, and is the same on every rank."""
    if isinstance(teacher, (TeacherConfidence, TeacherSimilarity)):
        check_teacher(teacher, labels[:, None], vocab, divergence, t_teacher)
    elif divergence == "decoupled_kl" and teacher is not None and vocab < 2:
        checks.fail(ValueError, "vocab_valid", "be at least 2 with 'decoupled_kl'", vocab)


def check_teacher_values(
    source: Source, options: RowOptions, labels: Tensor, layout: Layout, group: dist.ProcessGroup
) -> None:
    """The values of the teacher; what one rank finds in its slice, all of them raise."""
    error: ValueError | None = None
    try:
        if source.kind == "rows":
            kept_N1 = (labels != options.ignore_index)[:, None]
            name = "teacher.logprobs" if options.teacher == "logprobs" else "teacher.logits"
            part = source.tensors[0][:, : layout.size]
            if not bool((torch.where(kept_N1, part, 0) < torch.inf).all()):
                checks.fail(ValueError, name, "hold neither NaN nor +inf", "some")
        else:
            values.check_teacher(source, options, labels, layout.vocab)
    except ValueError as caught:
        error = caught
    agree.raise_together(error, group)
