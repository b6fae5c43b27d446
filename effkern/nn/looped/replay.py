"""What a loop that runs again has to find as it was: random states and autocast."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


class RandomStates:
    """Default generators of the CPU and of the given devices, as they were."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.devices = devices
        self.cpu = torch.get_rng_state()
        self.others = [_module(d).get_rng_state(*_which(d)) for d in devices]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.others):
            _module(device).set_rng_state(state, *_which(device))

    def equals(self, other: "RandomStates") -> bool:
        mine, others = (self.cpu, *self.others), (other.cpu, *other.others)
        return all(torch.equal(a, b) for a, b in zip(mine, others))


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """There is one MPS device only, and its functions do not ask for it."""
    return () if device.type == "mps" else (device,)


def devices_of(tensors: list[Tensor]) -> list[torch.device]:
    """Those with generators of their own."""
    found = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    return sorted(found, key=str)


class AutocastState:
    """Autocast of the CPU and of one device, as it was."""

    def __init__(self, device: torch.device) -> None:
        self.cache = torch.is_autocast_cache_enabled()
        kinds = dict.fromkeys(("cpu", device.type))
        self.kinds = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ]

    @property
    def enabled(self) -> bool:
        return any(on for _, _, on in self.kinds)

    @contextmanager
    def again(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype, on in self.kinds:
                if on or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=self.cache))
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """For the backward of what `again` has run; weights cast there are kept."""
        with ExitStack() as stack:
            for kind, _, _ in self.kinds:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
