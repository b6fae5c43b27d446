"""How long a step takes, and which share of it the loss op and the teacher have."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class StepTimer:
    """Seconds of one step: `loss` (the op, forward and backward), `teacher`, and `total`.

    The op's backward is the time from the start of the backward pass until the gradient of the hidden states is there,
    which is the first thing that a backward pass computes. On CUDA the marks synchronise, so only some steps are timed.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.enabled = enabled
        self.loss = self.teacher = 0.0
        self._start = self.now()
        self._backward_start = 0.0

    def now(self) -> float:
        if self.cuda is not None and self.enabled:
            torch.cuda.synchronize(self.cuda)
        return time.perf_counter()

    @property
    def total(self) -> float:
        return self.now() - self._start

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`."""
        start = self.now()
        yield
        setattr(self, part, getattr(self, part) + self.now() - start)

    def watch(self, hidden: Tensor) -> None:
        """Stop the clock of the op's backward when the gradient of `hidden` arrives."""
        if self.enabled:
            hidden.register_hook(self._stop)

    def backward(self, loss: Tensor) -> None:
        """loss.backward(), timed up to the hidden states."""
        self._backward_start = self.now()
        loss.backward()

    def _stop(self, gradient: Tensor) -> None:
        self.loss += self.now() - self._backward_start
