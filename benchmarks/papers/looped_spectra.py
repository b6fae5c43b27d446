"""The scalar model of looped linear attention: after L layers an eigenvalue lam of the examples' covariance leaves
p(lam) = prod_l (1 - a_l lam) of the target, and the loss is the mean of p^2 over the spectrum. Exact optima, in
float64.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Spectrum(NamedTuple):
    values: Array
    weights: Array
    """Of sum 1."""


def log_uniform(kappa: float, nodes: int = 600) -> Spectrum:
    """Eigenvalues log-uniform on [1, kappa], as the nodes of a Gauss rule."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return Spectrum(np.exp((x + 1) / 2 * np.log(kappa)), w / 2)


def atoms(count: int, kappa: float) -> Spectrum:
    """`count` eigenvalues of equal weight, spaced evenly in their logarithm."""
    return Spectrum(np.geomspace(1, kappa, count), np.full(count, 1 / count))


def loss(spectrum: Spectrum, rates: Array, scale: float = 1.0) -> float:
    """E p^2, with the spectrum scaled after the rates were chosen."""
    left = np.prod(1 - scale * spectrum.values[:, None] * rates, axis=1)
    return float(spectrum.weights @ left**2)


def best_looped(spectrum: Spectrum, loops: int) -> Array:
    """All a_l equal: the loss is convex in a, and its minimum lies below 2 / the least eigenvalue."""
    low, high = 0.0, 2 / spectrum.values.min()
    golden = (5**0.5 - 1) / 2
    for _ in range(200):
        first, second = high - golden * (high - low), low + golden * (high - low)
        with np.errstate(over="ignore"):
            lower = loss(spectrum, np.full(loops, first)) < loss(spectrum, np.full(loops, second))
        low, high = (low, second) if lower else (first, high)
    return np.full(loops, (low + high) / 2)


def best_free(spectrum: Spectrum, loops: int) -> Array:
    """The least E p^2 over p of degree L with p(0) = 1 is the kernel polynomial of the spectrum at 0.

    Its zeros 1 / a_l are the nodes of the Gauss-Radau rule with a node at 0, eigenvalues of the Jacobi matrix of the
    spectrum with one more row; at least `loops` different eigenvalues are needed. Increasing.
    """
    values, basis = spectrum.values, [np.sqrt(spectrum.weights)]
    diagonal, beside = [], []
    for _ in range(loops):
        v = values * basis[-1]
        diagonal.append(float(v @ basis[-1]))
        # Twice, or the basis loses its right angles.
        for _ in range(2):
            for u in basis:
                v = v - (u @ v) * u
        size = float(np.linalg.norm(v))
        beside.append(size)
        if len(diagonal) < loops:
            basis.append(v / size)
    matrix = np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    last = np.zeros(loops)
    last[-1] = beside[-1] ** 2
    corner = np.linalg.solve(matrix, last)[-1]
    radau = np.zeros((loops + 1, loops + 1))
    radau[:loops, :loops] = matrix
    radau[loops, loops] = corner
    radau[loops, loops - 1] = radau[loops - 1, loops] = beside[-1]
    # The node at 0 is the least.
    return np.sort(1 / np.linalg.eigvalsh(radau)[1:])


def after_each(spectrum: Spectrum, rates: Array) -> list[float]:
    """Losses of the read-outs after 1, 2, .. layers."""
    return [loss(spectrum, rates[: layer + 1]) for layer in range(len(rates))]


def falls(losses: list[float]) -> bool:
    """Whether each read-out is at most the one before, and the first at most 1, the loss of no layer at all."""
    return all(after <= before for before, after in zip([1.0, *losses], losses))
