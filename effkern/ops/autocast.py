"""Whether autocast is on, also for types of devices that have none (meta), and inside a compiled function."""

import torch


def _available(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


# A traced call takes the answer as it stands: torch 2.11 cannot trace the question.
_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocasts(kind: str) -> bool:
    """True where operations on devices of that type ("cpu", "cuda") run under autocast."""
    return _available(kind) and torch.is_autocast_enabled(kind)
