"""The maps of scalars.py for one number per scalar on a CPU, where an operator of torch takes longer."""

import math
from collections.abc import Sequence


def coefficients(weights: Sequence[float], scalar_map: str) -> tuple[float, float]:
    """alpha and beta; the formulas are scalars.coefficients'."""
    if scalar_map in ("softmax2", "softmax"):
        factor = 2.0 if scalar_map == "softmax2" else 1.0
        first, second = _softmax(*weights)
        return factor * first, factor * second
    if scalar_map == "sigmoid1":
        return _sigmoid(weights[0]), _sigmoid(-weights[0])
    if scalar_map == "sigmoid":
        return 2.0 * _sigmoid(weights[0]), 2.0 * _sigmoid(weights[1])
    return weights[0], weights[1]


def gradient(weights: Sequence[float], scalar_map: str, grad_alpha: float, grad_beta: float) -> list[float]:
    """Of the raw scalars; the formulas are scalars.gradient's."""
    if scalar_map in ("softmax2", "softmax"):
        factor = 2.0 if scalar_map == "softmax2" else 1.0
        first, second = _softmax(*weights)
        one = factor * first * second * (grad_alpha - grad_beta)
        return [one, -one]
    if scalar_map == "sigmoid1":
        return [(grad_alpha - grad_beta) * _slope(weights[0])]
    if scalar_map == "sigmoid":
        return [2.0 * grad * _slope(w) for grad, w in zip((grad_alpha, grad_beta), weights)]
    return [grad_alpha, grad_beta]


def _softmax(first: float, second: float) -> tuple[float, float]:
    return _sigmoid(first - second), _sigmoid(second - first)


def _sigmoid(x: float) -> float:
    if x >= 0.0:
        return 1.0 / (1.0 + math.exp(-x))
    e = math.exp(x)
    return e / (1.0 + e)


def _slope(x: float) -> float:
    return _sigmoid(x) * _sigmoid(-x)
