"""The terms of a loop step: all arguments but the three streams."""

from typing import NamedTuple

from torch import Tensor

# A number, or a tensor of shape [], [1] or [D].
Factor = float | Tensor


class Terms(NamedTuple):
    alpha: Factor
    beta: Factor
    """The number 0 leaves the term out, so that h is not read for it."""
    state_scale: Factor
    input_scale: Factor
    down: Tensor | None
    up: Tensor | None
    norm_weight: Tensor | None
    embedding: Tensor | None
    norm: bool
    eps: float
    has_input: bool
    return_change: bool

    @property
    def keeps_f(self) -> bool:
        """Whether s is f itself."""
        return not (self.norm or self.has_beta or self.down is not None or isinstance(self.alpha, Tensor)
                    or self.alpha != 1.0)  # fmt: skip

    @property
    def has_beta(self) -> bool:
        return isinstance(self.beta, Tensor) or self.beta != 0.0

    @property
    def has_core_input(self) -> bool:
        """Whether x differs from s."""
        return (
            self.has_input or self.embedding is not None or isinstance(self.state_scale, Tensor)
            or self.state_scale != 1.0
        )  # fmt: skip
