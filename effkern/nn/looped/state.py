"""Where a caller stands who goes loop by loop."""

from typing import Any, NamedTuple

from torch import Tensor


class LoopState(NamedTuple):
    """Between two loops: see LoopedBlock.start."""

    state: Tensor
    """h_t."""
    source: Tensor
    """The block's input x."""
    loop: int
    """t: loops done."""
    change: Tensor | None = None
    """||h_t - h_{t-1}|| / ||h_t|| per token, float32; None before the first loop."""

    def rows(self, index: Any) -> "LoopState":
        """Of these rows of the first dimension."""
        change = None if self.change is None else self.change[index]
        return LoopState(self.state[index], self.source[index], self.loop, change)
