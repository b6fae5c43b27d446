"""Numbers of loops drawn as pure functions of (seed, step): the same on every rank, no global generator is touched."""

import hashlib
import math
import random
from dataclasses import dataclass


def _stream(name: str, seed: int, step: int) -> random.Random:
    for what, value in (("seed", seed), ("step", step)):
        if type(value) is not int:
            raise TypeError(f"{name}: {what} must be a whole number, got {value!r}")
    return random.Random(hashlib.sha256(f"{name}:{seed}:{step}".encode()).digest())


@dataclass(frozen=True)
class UniformLoops:
    """Every number in low .. high is as likely.

    Args:
        low, high: 1 <= low <= high.
        with_gradient: through the last so many loops only (all, if fewer are drawn); None: through all.

    Raises:
        ValueError: an argument breaks a rule.
        TypeError: one is no number, or no whole number.
    """

    low: int
    high: int
    with_gradient: int | None = None

    def __post_init__(self) -> None:
        name = "UniformLoops"
        _whole(name, "low", self.low)
        _whole(name, "high", self.high)
        _require(name, "high", self.high, self.high >= self.low, f"be at least low={self.low}")
        _whole(name, "with_gradient", self.with_gradient, optional=True)

    def draw(self, step: int, seed: int = 0) -> int:
        return _stream("UniformLoops", seed, step).randint(self.low, self.high)

    @property
    def in_evaluation(self) -> int:
        """Loops where none are given and the module does not train: high."""
        return self.high


@dataclass(frozen=True)
class PoissonLognormalLoops:
    """1 + Poisson(rate) with rate = exp(ln(mean) - sigma^2/2 + sigma z), z standard normal: heavy-tailed, as Huginn.

    The rate's mean is `mean`, that of the loops mean + 1. Huginn trains with mean 32, sigma 0.5, with_gradient 8.

    Args:
        mean: > 0. sigma: >= 0.
        limit: larger draws become this; None: no limit.
        with_gradient: through the last so many loops only (all, if fewer are drawn); None: through all.

    Raises:
        ValueError: an argument breaks a rule.
        TypeError: one is no number, or no whole number.

    Source: Geiping et al., arXiv 2502.05171, and its public code.
    """

    mean: float = 32
    sigma: float = 0.5
    limit: int | None = None
    with_gradient: int | None = None

    def __post_init__(self) -> None:
        name = "PoissonLognormalLoops"
        for argument in ("mean", "sigma"):
            value = getattr(self, argument)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: {argument} must be a number, got {value!r}")
        _require(name, "mean", self.mean, 0 < self.mean <= 1e6, "lie in (0, 1e6]")
        _require(name, "sigma", self.sigma, 0 <= self.sigma <= 10, "lie in [0, 10]")
        _whole(name, "limit", self.limit, optional=True)
        _whole(name, "with_gradient", self.with_gradient, optional=True)

    def draw(self, step: int, seed: int = 0) -> int:
        stream = _stream("PoissonLognormalLoops", seed, step)
        rate = math.exp(math.log(self.mean) - self.sigma**2 / 2 + self.sigma * stream.gauss(0.0, 1.0))
        loops = 1 + _poisson(rate, stream)
        return loops if self.limit is None else min(loops, self.limit)

    @property
    def in_evaluation(self) -> int:
        """Loops where none are given and the module does not train: the mean, rounded."""
        return max(1, round(self.mean)) if self.limit is None else min(max(1, round(self.mean)), self.limit)


Sampler = UniformLoops | PoissonLognormalLoops


def _poisson(rate: float, stream: random.Random) -> int:
    """Arrivals of a unit-rate process before `rate`: exact for any rate, and no exp(-rate) that could vanish."""
    count, time = 0, stream.expovariate(1.0)
    while time <= rate:
        count += 1
        time += stream.expovariate(1.0)
    return count


def _whole(name: str, argument: str, value: object, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if type(value) is not int:
        raise TypeError(f"{name}: {argument} must be a whole number, got {value!r}")
    _require(name, argument, value, value >= 1, "be a whole number of at least 1")


def _require(name: str, argument: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {argument} must {rule}, got {value!r}")
