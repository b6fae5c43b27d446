"""The distillation weight omega and the learning rate, as pure functions of the step (steps count from 0).

SALT (arXiv 2410.18779): omega > 0 in the first kd_steps, then exactly 0.
With w0 = omega, n1 = decay_start, n2 = kd_steps:

    step          w(s) = w0 for s < n2, else 0
    linear        w(s) = w0 * clip((n2 - s)/(n2 - n1), 0, 1)
    linear_ratio  r(s) = w0/(1-w0) * clip((n2 - s)/(n2 - n1), 0, 1),  w = r/(1+r)
"""

import math

from effkern.train.config import OptimizerConfig, ScheduleConfig


def omega_at(schedule: ScheduleConfig, step: int) -> float:
    """Distillation weight of step `step`; exactly 0 where no teacher is needed."""
    if schedule.mode == "baseline":
        return 0.0
    if schedule.mode == "rkd":
        return schedule.omega
    if schedule.transition == "step":
        return schedule.omega if step < schedule.kd_steps else 0.0
    rest = (schedule.kd_steps - step) / (schedule.kd_steps - schedule.decay_start)
    rest = min(max(rest, 0.0), 1.0)
    if schedule.transition == "linear":
        return schedule.omega * rest
    ratio = schedule.omega / (1.0 - schedule.omega) * rest
    return ratio / (1.0 + ratio)


def teacher_steps(schedule: ScheduleConfig) -> int:
    """Number of leading steps that may need the teacher; from this step on it never runs again."""
    if schedule.omega == 0 or schedule.mode == "baseline":
        return 0
    return schedule.steps if schedule.mode == "rkd" else schedule.kd_steps


def learning_rate(optimizer: OptimizerConfig, total_steps: int, step: int) -> float:
    """Linear warm-up to lr at step `warmup_steps`, then a cosine that reaches lr * min_lr_ratio at `total_steps`."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / (optimizer.warmup_steps + 1)
    progress = (step - optimizer.warmup_steps) / max(1, total_steps - optimizer.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return optimizer.lr * (optimizer.min_lr_ratio + (1.0 - optimizer.min_lr_ratio) * cosine)
