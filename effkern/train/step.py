"""One optimizer step: accumulate over micro-batches, clip, and apply unless something is not finite."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from effkern.models import Decoder
from effkern.ops.distill import TeacherHidden, TeacherTopK, linear_distill_loss
from effkern.train.cached_teacher import StepLabels
from effkern.train.config import TrainConfig
from effkern.train.device import autocast
from effkern.train.exit_loss import exit_loss
from effkern.train.optimizer import set_rate
from effkern.train.parallel import ALONE, IGNORE, Alone
from effkern.train.timing import StepTimer


@dataclass(frozen=True)
class StepResult:
    """Means over the supervised tokens of one step (nats per token), measured before its update."""

    loss: float
    """What was minimised: (1 - omega) ce + omega divergence; with an exit gate what exit_loss says."""
    ce: float
    divergence: float
    accuracy: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    applied: bool
    """False: something was not finite and no parameter was touched."""


def to_device(batch: np.ndarray, device: torch.device) -> Tensor:
    """Token ids as an int64 tensor on `device`."""
    return torch.from_numpy(np.ascontiguousarray(batch, dtype=np.int64)).to(device)


def train_step(
    model: Decoder,
    forward: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    config: TrainConfig,
    *,
    teacher: Decoder | None,
    labels: StepLabels | None = None,
    omega: float,
    rate: float,
    dtype: torch.dtype,
    timer: StepTimer,
    step: int = 0,
    parallel: Alone = ALONE,
) -> StepResult:
    """One update from `tokens` [this rank's rows, seq_len + 1]; `forward` is `model`, its compiled or its wrapped form.

    Every micro-batch divides by the number of supervised tokens of the whole step, so that accumulation gives the
    gradient of the whole batch. The teacher runs only where omega > 0; `labels` are a cache's, in its place.
    With an exit gate the loss is exit_loss, and ce and accuracy are those of the last loop.
    A looped model draws its loops from `step`: the same for all micro-batches, and again after a resume.
    """
    looped = {"step": step} if model.config.stack == "looped" else {}
    denom = parallel.denominator(tokens[:, 1:])
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(4, dtype=torch.float64, device=tokens.device)
    loss_op = parallel.spread_loss or linear_distill_loss
    parts = tokens.split(config.data.micro_rows)
    for first, rows in enumerate(parts):
        inputs, targets = rows[:, :-1], rows[:, 1:].flatten()
        with parallel.accumulate(forward, last=first == len(parts) - 1):
            if model.config.loop.exit_gate:
                with autocast(tokens.device, dtype), timer.measure("loss"):
                    outputs = parallel.loop_outputs(model, forward)
                    exits = exit_loss(model, inputs, targets, step=step, ignore=IGNORE, denom=denom, outputs=outputs)
                timer.backward(exits.loss)
                found = (exits.loss.detach() * denom, exits.ce.sum(), exits.ce.new_zeros(()), exits.hit.sum())
                sums += torch.stack([part.double() for part in found])
                continue
            with autocast(tokens.device, dtype):
                target: TeacherHidden | TeacherTopK | None = None
                # A cache has the temperature in its labels.
                teacher_temperature = config.teacher.temperature if labels is None else 1.0
                if omega > 0 and labels is not None:
                    target = labels.rows(first * config.data.micro_rows, len(rows))
                elif omega > 0 and teacher is not None:
                    with timer.measure("teacher"), torch.no_grad():
                        target = TeacherHidden(teacher(inputs).flatten(0, 1), teacher.head_weight)
                hidden = forward(inputs, **looped).flatten(0, 1)
                timer.watch(hidden)
                with timer.measure("loss"):
                    result = loss_op(
                        hidden,
                        model.head_weight,
                        targets,
                        teacher=target,
                        omega=None if target is None else omega,
                        temperature=None if target is None else config.teacher.student_temperature,
                        teacher_temperature=None if target is None else teacher_temperature,
                        ignore_index=IGNORE,
                        vocab_valid=model.vocab_valid,
                        denom=denom,
                    )
            timer.backward(result.loss)
        stats = result.stats
        found = (result.loss.detach() * denom, stats.ce.sum(), stats.divergence.sum(), stats.hit.sum())
        sums += torch.stack([part.double() for part in found])
    norm = parallel.clip(model, config.optimizer.clip_norm or torch.inf)
    count = parallel.tokens(denom)
    loss, ce, divergence, hits = (parallel.total(sums) / max(1, count)).tolist()
    norm_value = float(norm)
    # A NaN that sits in the loss alone would not show in the gradient, and the other way round.
    applied = bool(np.isfinite(loss) and np.isfinite(norm_value))
    if applied:
        set_rate(optimizer, rate)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, ce, divergence, hits, norm_value, count, applied)
