"""Drawn numbers of loops: distributions, reproducible from (seed, step), no generator touched."""

import random
import statistics
import subprocess
import sys

import pytest
import torch

from effkern.nn import PoissonLognormalLoops, UniformLoops

STEPS = 20000


def test_uniform():
    draws = [UniformLoops(2, 5).draw(step) for step in range(STEPS)]
    counts = [draws.count(n) for n in range(2, 6)]
    assert sum(counts) == STEPS
    # Five standard deviations.
    assert all(abs(c - STEPS / 4) < 5 * (STEPS * 3 / 16) ** 0.5 for c in counts)
    assert UniformLoops(3, 3).draw(7) == 3
    assert UniformLoops(2, 5).in_evaluation == 5


def test_poisson_lognormal_is_huginns():
    """Mean 33; variance of a mixed Poisson: mean + mean^2 (e^{sigma^2} - 1); median of the rate below the mean."""
    draws = [PoissonLognormalLoops().draw(step) for step in range(STEPS)]
    variance = 32 + 32**2 * (2.718281828 ** (0.5**2) - 1)
    assert abs(statistics.mean(draws) - 33) < 5 * (variance / STEPS) ** 0.5
    assert abs(statistics.variance(draws) / variance - 1) < 0.1
    # exp(ln 32 - 1/8) = 28.2, and a Poisson's median is within one of its rate.
    assert abs(statistics.median(draws) - 29) <= 1
    assert min(draws) >= 1
    narrow = [PoissonLognormalLoops(4, 0).draw(step) for step in range(STEPS)]
    assert abs(statistics.mean(narrow) - 5) < 5 * (4 / STEPS) ** 0.5
    assert abs(narrow.count(1) / STEPS - 0.0183) < 0.005
    assert max(PoissonLognormalLoops(limit=40).draw(step) for step in range(100)) == 40
    assert PoissonLognormalLoops().in_evaluation == 32
    assert PoissonLognormalLoops(0.1).in_evaluation == 1
    assert PoissonLognormalLoops(limit=8).in_evaluation == 8


@pytest.mark.parametrize("sampler", [UniformLoops(1, 1000), PoissonLognormalLoops(500)], ids=lambda s: type(s).__name__)
def test_the_same_everywhere_and_nothing_is_touched(sampler):
    states = torch.get_rng_state(), random.getstate()
    draws = [sampler.draw(step, seed=4) for step in range(20)]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert draws == [sampler.draw(step, seed=4) for step in range(20)]
    others = [sampler.draw(step, seed=5) for step in range(20)]
    assert sum(a == b for a, b in zip(draws, others)) < 3
    assert len(set(draws)) > 15
    # Another process, as another rank is, with another hash seed.
    code = f"from effkern.nn import *; print([{sampler!r}.draw(step, seed=4) for step in range(20)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(draws)


def test_values_of_this_release():
    """A change of these numbers changes what a resumed run would have drawn."""
    assert [UniformLoops(1, 100).draw(step) for step in range(5)] == UNIFORM
    assert [PoissonLognormalLoops().draw(step) for step in range(5)] == POISSON


UNIFORM = [71, 91, 22, 69, 79]
POISSON = [27, 48, 21, 23, 21]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformLoops(0, 3), "UniformLoops: low must be a whole number of at least 1, got 0"),
        (lambda: UniformLoops(4, 3), "UniformLoops: high must be at least low=4, got 3"),
        (lambda: UniformLoops(1, 3, with_gradient=0), "UniformLoops: with_gradient must be a whole number"),
        (lambda: PoissonLognormalLoops(0), "PoissonLognormalLoops: mean must lie in"),
        (lambda: PoissonLognormalLoops(4, -1), "PoissonLognormalLoops: sigma must lie in"),
        (lambda: PoissonLognormalLoops(limit=0), "PoissonLognormalLoops: limit must be a whole number"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformLoops(1.0, 3), r"UniformLoops: low must be a whole number, got 1\.0"),
        (lambda: UniformLoops(1, "3"), "UniformLoops: high must be a whole number, got '3'"),
        (lambda: UniformLoops(True, 3), "UniformLoops: low must be a whole number, got True"),
        (lambda: UniformLoops(1, 3, 2.0), r"UniformLoops: with_gradient must be a whole number, got 2\.0"),
        (lambda: PoissonLognormalLoops("3"), "PoissonLognormalLoops: mean must be a number, got '3'"),
        (lambda: PoissonLognormalLoops(True), "PoissonLognormalLoops: mean must be a number, got True"),
        (lambda: PoissonLognormalLoops(3, None), "PoissonLognormalLoops: sigma must be a number, got None"),
        (lambda: PoissonLognormalLoops(limit=8.0), r"PoissonLognormalLoops: limit must be a whole number, got 8\.0"),
    ],
)
def test_arguments_of_another_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_step_must_be_a_whole_number():
    with pytest.raises(TypeError, match=r"UniformLoops: step must be a whole number, got 1\.0"):
        UniformLoops(1, 3).draw(1.0)
