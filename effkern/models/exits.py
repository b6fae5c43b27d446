"""When a sequence has looped enough, decided for every sequence of a batch at once.

A test looks at the last position of each sequence after every loop. It compares a loop's output with that of the loop
before, so the earliest exit is after two loops; the gate's may come after one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExitTest:
    """Exit after `patience` loops in a row whose distance to the loop before is below `threshold`.

    Subclasses say what of a loop is compared, and how. R sequences.
    """

    threshold: float
    patience: int = 1
    min_loops: int = 1
    """No sequence exits after fewer."""
    prefill: bool = False
    """Also exit in passes of several tokens, where the last position decides for all."""

    reads: ClassVar[str] = "state"
    """"state" after the loop, its "change", the model's "logits" had it ended here, or the "gate"'s probability."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise TypeError(f"{name}: threshold must be a number, got {self.threshold!r}")
        if not self.threshold > 0:
            raise ValueError(f"{name}: threshold must be positive, got {self.threshold!r}")
        for field in ("patience", "min_loops"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: {field} must be a whole number of at least 1, got {value!r}")

    def signal(self, x: Tensor) -> Tensor:
        """What is kept of `x`: the state [R, D], the logits [R, V], the change or the gate [R]."""
        return _wide(x)

    def distance(self, now: Tensor, before: Tensor) -> Tensor:
        """[R], from the signals of two loops."""
        raise NotImplementedError

    def step(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """The signal of a loop, and in which sequences it is below the threshold."""
        now = self.signal(x)
        if before is None:
            return now, torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return now, self.distance(now, before) < self.threshold


@dataclass(frozen=True)
class RelativeChange(ExitTest):
    """||h_t - h_{t-1}|| / ||h_t|| of the state, as effkern.loop_step finds it on the way."""

    threshold: float = 0.03
    reads: ClassVar[str] = "change"

    def step(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        # The first loop's change is against h_0, which no loop has made.
        return x, (x < self.threshold) & (before is not None)


@dataclass(frozen=True)
class Cosine(ExitTest):
    """1 - cos(h_t, h_{t-1}) of the state."""

    threshold: float = 1e-3

    def distance(self, now: Tensor, before: Tensor) -> Tensor:
        return 1 - torch.nn.functional.cosine_similarity(now, before, dim=-1)


@dataclass(frozen=True)
class Entropy(ExitTest):
    """|H(p_t) - H(p_{t-1})| of the next token's distribution, in nats."""

    threshold: float = 1e-3
    reads: ClassVar[str] = "logits"

    def signal(self, x: Tensor) -> Tensor:
        logp = _wide(x).log_softmax(-1)
        return torch.special.entr(logp.exp()).sum(-1)

    def distance(self, now: Tensor, before: Tensor) -> Tensor:
        return (now - before).abs()


@dataclass(frozen=True)
class KL(ExitTest):
    """KL(p_{t-1} || p_t) of the next token's distribution, in nats."""

    threshold: float = 1e-3
    reads: ClassVar[str] = "logits"

    def signal(self, x: Tensor) -> Tensor:
        return _wide(x).log_softmax(-1)

    def distance(self, now: Tensor, before: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(now, before, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class ArgmaxStable(ExitTest):
    """The most likely token has stayed the same for `patience` loops. `threshold` has no part in it."""

    threshold: float = 0.5
    patience: int = 5
    reads: ClassVar[str] = "logits"

    def signal(self, x: Tensor) -> Tensor:
        return x.argmax(-1)

    def distance(self, now: Tensor, before: Tensor) -> Tensor:
        return (now != before).float()


@dataclass(frozen=True)
class GateCDF(ExitTest):
    """1 - prod_{j <= t} (1 - lambda_j) >= threshold, with the exit gate's lambda (Ouro's q)."""

    threshold: float = 0.5
    reads: ClassVar[str] = "gate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold > 1:
            raise ValueError(f"GateCDF: threshold must lie in (0, 1], got {self.threshold!r}")

    def step(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        stayed = 1 - _wide(x) if before is None else before * (1 - _wide(x))
        return stayed, 1 - stayed >= self.threshold


EXITS: dict[str, type[ExitTest]] = {
    "relative-change": RelativeChange,
    "cosine": Cosine,
    "entropy": Entropy,
    "kl": KL,
    "argmax-stable": ArgmaxStable,
    "gate-cdf": GateCDF,
}


def exit_test(text: str | ExitTest) -> ExitTest:
    """The test called NAME or NAME=NUMBER: the threshold, for argmax-stable the number of loops.

    Raises:
        ValueError: there is none of this name, or the number breaks its rule.
        TypeError: it is neither text nor a test.
    """
    if isinstance(text, ExitTest):
        return text
    if not isinstance(text, str):
        raise TypeError(f"exit: test must be a name, NAME=NUMBER or an ExitTest, got {text!r}")
    name, equals, number = text.partition("=")
    if name not in EXITS:
        raise ValueError(f"exit: test must be one of {', '.join(EXITS)}, got {text!r}")
    if not equals:
        return EXITS[name]()  # type: ignore[call-arg]
    try:
        value = int(number) if name == "argmax-stable" else float(number)
    except ValueError:
        raise ValueError(f"exit: {name} must be followed by a number, got {text!r}") from None
    return ArgmaxStable(patience=int(value)) if name == "argmax-stable" else EXITS[name](threshold=value)


class ExitTracker:
    """A test over the loops of one pass, for the sequences that are still looping."""

    def __init__(self, test: ExitTest) -> None:
        self.test = test
        self.loops = 0
        self._before: Tensor | None = None
        self._calm: Tensor | None = None

    def update(self, x: Tensor) -> Tensor:
        """Which sequences may exit after this loop, bool [R]."""
        self._before, passed = self.test.step(x, self._before)
        calm = passed.long()
        self._calm = calm if self._calm is None else (self._calm + 1) * calm
        self.loops += 1
        return (self._calm >= self.test.patience) & (self.loops >= self.test.min_loops)

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the sequences."""
        assert self._before is not None
        assert self._calm is not None
        self._before, self._calm = self._before[rows], self._calm[rows]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
