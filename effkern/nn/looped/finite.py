"""Which loop's state was the first that is not finite: a flag a loop, read once."""

import torch
from torch import Tensor


class FiniteFlags:
    def __init__(self, on: bool, first: int = 0) -> None:
        """first: the number of the first loop that is looked at."""
        self.on, self.first = on, first
        self.extremes: list[Tensor] = []

    def add(self, state: Tensor) -> None:
        if self.on and state.numel():
            # One pass over the state; NaN and infinities get through to the extremes.
            self.extremes.append(torch.stack(torch.aminmax(state.detach())))

    def check(self) -> None:
        """Raises FloatingPointError with the first loop."""
        if not self.extremes:
            return
        finite = torch.stack(self.extremes).isfinite().all(1).tolist()
        if not all(finite):
            first, loops = self.first + finite.index(False), self.first + len(finite)
            raise FloatingPointError(
                f"LoopedBlock: state must be finite after every loop, got a value that is not after loop {first} "
                f"(counted from 0, of {loops})"
            )
