"""The scalar model: exact optima against a plain minimiser, the figures they are known for, and the op against it."""

import numpy as np
import pytest
import torch

from benchmarks.papers import looped_in_context as experiment
from benchmarks.papers import looped_spectra as spectra


@pytest.mark.parametrize(
    ("kappa", "loops", "looped", "free"),
    [(10, 4, 3.7e-2, 6.8e-3), (10, 8, 4.3e-3, 3.8e-5), (10, 16, 9.6e-5, 1.1e-9), (100, 8, 0.186, 0.038),
     (100, 16, 0.091, 1.7e-3), (100, 32, 0.030, 2.9e-6)],
)  # fmt: skip
def test_known_figures(kappa, loops, looped, free):
    spectrum = spectra.log_uniform(kappa)
    assert spectra.loss(spectrum, spectra.best_looped(spectrum, loops)) == pytest.approx(looped, rel=0.03)
    assert spectra.loss(spectrum, spectra.best_free(spectrum, loops)) == pytest.approx(free, rel=0.03)


def test_optima_are_optima():
    """No step in any direction is better; the looped one is the best of a fine grid."""
    spectrum = spectra.log_uniform(10)
    rates = spectra.best_free(spectrum, 4)
    best = spectra.loss(spectrum, rates)
    for i in range(4):
        for change in (-1e-3, 1e-3):
            moved = rates.copy()
            moved[i] *= 1 + change
            assert spectra.loss(spectrum, moved) > best
    looped = spectra.best_looped(spectrum, 4)
    grid = [spectra.loss(spectrum, np.full(4, a)) for a in np.linspace(0.01, 0.5, 2000)]
    assert min(grid) == pytest.approx(spectra.loss(spectrum, looped), rel=1e-4)
    assert spectra.loss(spectrum, looped) <= min(grid)


def test_fragility():
    spectrum = spectra.atoms(16, 10.0)
    assert spectra.loss(spectrum, 1 / spectrum.values) < 1e-20
    assert spectra.loss(spectrum, 1 / spectrum.values, 1.001) == pytest.approx(47, rel=0.03)
    looped = spectra.best_looped(spectrum, 16)
    assert spectra.loss(spectrum, looped) == pytest.approx(1.9e-4, rel=0.03)
    assert spectra.loss(spectrum, looped, 1.001) == pytest.approx(1.9e-4, rel=0.03)


def test_read_outs():
    spectrum = spectra.log_uniform(100)
    assert spectra.falls(spectra.after_each(spectrum, spectra.best_looped(spectrum, 16)))
    assert not spectra.falls(spectra.after_each(spectrum, spectra.best_free(spectrum, 16)[::-1]))
    assert not spectra.falls([1.5, 0.1])


@pytest.mark.parametrize("spectrum", ["log-uniform", "atoms"])
def test_the_op_does_what_the_model_says(spectrum):
    """Layers a_l 1 on tasks of the experiment: the loss after each loop, up to what 20000 tasks leave."""
    loops, dim, kappa = 4, 4, 10.0
    law = spectra.atoms(dim, kappa) if spectrum == "atoms" else spectra.log_uniform(kappa)
    rates = np.array([0.15, 0.3, 0.1, 0.2])
    generator = torch.Generator().manual_seed(3)
    task = experiment.tasks(spectrum, kappa, dim, 20000, generator)
    n = task[0].shape[1]
    sigma = task[0].transpose(1, 2) @ task[0] / n
    values = torch.linalg.eigvalsh(sigma)
    assert values.min() > 0.99
    assert values.max() < 10.01
    matrices = torch.from_numpy(rates).float()[:, None, None] * torch.eye(dim)
    found = experiment.losses(matrices, task, loops)
    expected = torch.tensor(spectra.after_each(law, rates))
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.06, atol=0)
