"""The experiment in small: one-sided wins on rotated curvature by three orders of magnitude over every other row."""

import pytest

from benchmarks.papers import shampoo_regression as experiment

DIM, STEPS = 48, 100
# The sweep's best rates at this size and their neighbours (powers of two): all of 2^-10 .. 2^6 take minutes.
RATES = {
    "one-sided, left": (-3, -1),
    "one-sided, wrong side": (-6, 0),
    "two-sided 1/4, 1/4, effkern.optim.Shampoo": (-5, 0),
    "diagonal": (-8, -1),
    "norm": (-8, 2),
    "full matrix": (-3, 3),
}


@pytest.mark.parametrize("kind", ["sum", "ema"])
def test_one_sided_wins_on_rotated_curvature(kind):
    p = experiment.problem(DIM, True, 0)
    values = {}
    for name, (low, high) in RATES.items():
        rates = tuple(2.0**k for k in range(low, high + 1))
        values[name] = experiment.best(experiment.METHODS[name], p, kind, STEPS, rates)[0]
    ours = values.pop("one-sided, left")
    assert min(values.values()) > 1e3 * ours, values
    shipped = "one-sided, left, effkern.optim.Shampoo"
    rates = tuple(2.0**k for k in range(*RATES["one-sided, left"]))
    assert experiment.best(experiment.METHODS[shipped], p, kind, STEPS, rates)[0] < 1e-3 * min(values.values())
