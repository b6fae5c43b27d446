"""omega and the learning rate at their knots."""

import math
from itertools import pairwise

import pytest

from effkern.train.config import OptimizerConfig, ScheduleConfig
from effkern.train.schedules import learning_rate, omega_at, teacher_steps


def make(**kwargs) -> ScheduleConfig:
    return ScheduleConfig(**{"steps": 100, "mode": "salt", "omega": 0.6, "kd_steps": 40, "decay_start": 20, **kwargs})


def test_step():
    s = make(transition="step")
    assert [omega_at(s, i) for i in (0, 39, 40, 99)] == [0.6, 0.6, 0.0, 0.0]


def test_linear():
    s = make(transition="linear")
    assert [omega_at(s, i) for i in (0, 20, 40, 99)] == [0.6, 0.6, 0.0, 0.0]
    assert omega_at(s, 30) == pytest.approx(0.3)
    assert omega_at(s, 35) == pytest.approx(0.15)


def test_linear_ratio():
    s = make(transition="linear_ratio")
    # r0 = 0.6 / 0.4 = 1.5; half of it is 0.75 -> 0.75 / 1.75.
    assert omega_at(s, 0) == pytest.approx(0.6)
    assert omega_at(s, 20) == pytest.approx(0.6)
    assert omega_at(s, 30) == pytest.approx(0.75 / 1.75)
    assert [omega_at(s, i) for i in (40, 99)] == [0.0, 0.0]
    ratios = [omega_at(s, i) / (1 - omega_at(s, i)) for i in range(20, 40)]
    assert all(a - b == pytest.approx(1.5 / 20) for a, b in pairwise(ratios))


def test_modes():
    assert {omega_at(make(mode="baseline"), i) for i in range(100)} == {0.0}
    assert {omega_at(make(mode="rkd"), i) for i in range(100)} == {0.6}
    assert [teacher_steps(make(mode=m)) for m in ("baseline", "salt", "rkd")] == [0, 40, 100]
    assert teacher_steps(make(omega=0.0)) == 0


@pytest.mark.parametrize("transition", ["step", "linear", "linear_ratio"])
def test_no_teacher_after_its_last_step(transition):
    s = make(transition=transition)
    assert all(omega_at(s, i) == 0 for i in range(teacher_steps(s), 100))
    assert omega_at(s, teacher_steps(s) - 1) > 0


def test_learning_rate():
    o = OptimizerConfig(lr=2.0, min_lr_ratio=0.25, warmup_steps=9)
    assert learning_rate(o, 109, 0) == pytest.approx(0.2)
    assert learning_rate(o, 109, 8) == pytest.approx(1.8)
    assert learning_rate(o, 109, 9) == 2.0
    assert learning_rate(o, 109, 59) == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert learning_rate(o, 109, 109) == pytest.approx(0.5)
    quarter = 0.5 * (1 + math.cos(math.pi / 4))
    assert learning_rate(o, 109, 34) == pytest.approx(2.0 * (0.25 + 0.75 * quarter))
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_steps=0), 10, 0) == 1.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"omega": 1.5}, r"schedule.omega must be in \[0, 1\], got 1.5"),
        ({"omega": 1.0, "transition": "linear_ratio"}, r"schedule.omega must be below 1 for linear_ratio, got 1.0"),
        ({"kd_steps": 0}, r"schedule.kd_steps must be in \[1, steps=100\], got 0"),
        ({"kd_steps": 101}, r"schedule.kd_steps must be in \[1, steps=100\], got 101"),
        ({"decay_start": 40, "transition": "linear"}, r"schedule.decay_start must be in \[0, kd_steps=40\), got 40"),
        ({"mode": "sal"}, r"schedule.mode must be baseline, salt or rkd, got 'sal'"),
        ({"steps": 0}, r"schedule.steps must be at least 1, got 0"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
