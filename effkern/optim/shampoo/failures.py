"""Counters of failures in a row, read without making a device wait."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROOT = "root"
GRADIENT = "gradient"
UPDATE = "update"
ADAMW = "AdamW's gradient"

Counters = list[tuple[str, Sequence[str], Tensor]]

_KEPT = {
    ROOT: "inverse root of {} failed; it keeps the one before",
    GRADIENT: "gradient of {} is not finite; factor, root, momentum and weight of that block stay as they were",
    UPDATE: "update of {} is not finite, for its momentum or root; momentum and weight of that block stay as they were",
    ADAMW: "gradient of {} is not finite; what AdamW steps in its group stays as it was",
}


class Watch:
    """Warns once for each parameter and raises after `limit` failures in a row.

    Counters on the CPU are read at every call. Those on a device are copied without waiting at every `every`-th call
    and read at a later call when the copy is there, so that a failure is told of within 2 * every + 1 steps.
    """

    def __init__(self) -> None:
        self._warned: set[tuple[str, str]] = set()
        self._calls = 0
        self._pending: list[tuple[str, Sequence[str], Tensor, torch.cuda.Event]] = []

    def check(self, counters: Callable[[], Counters], on_cpu: bool, limit: int, every: int) -> None:
        """`counters` gives what is counted, the parameters' names, and int32 counts of the same length."""
        self._calls += 1
        for kind, names, counts in self._arrived():
            self._read(kind, names, counts, limit)
        if not on_cpu and (self._pending or self._calls % every):
            return
        for kind, names, counts in counters():
            if counts.device.type == "cpu":
                if counts.any():
                    self._read(kind, names, counts, limit)
            else:
                copy = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
                copy.copy_(counts, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(counts.device))
                self._pending.append((kind, names, copy, event))

    def _arrived(self) -> Counters:
        if not self._pending or not all(event.query() for *_, event in self._pending):
            return []
        found = [(kind, names, copy) for kind, names, copy, _ in self._pending]
        self._pending = []
        return found

    def _read(self, kind: str, names: Sequence[str], counts: Tensor, limit: int) -> None:
        for name, count in zip(names, counts.tolist()):
            if count and (kind, name) not in self._warned:
                self._warned.add((kind, name))
                warnings.warn(f"Shampoo: {_KEPT[kind].format(name)}", RuntimeWarning, stacklevel=4)
            if count >= limit:
                raise RuntimeError(
                    f"Shampoo: {kind} of {name} must be finite, got {count} failures in a row (max_failures={limit}); "
                    "all else has taken this step"
                )
