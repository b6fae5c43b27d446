"""Tables on a device for kernels that take many tensors in one launch: addresses, and what else is said of each."""

import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Entry(NamedTuple):
    table: Tensor
    copied: torch.cuda.Event | None
    """Recorded behind the copy to a GPU."""
    stream: int


_TABLES: dict[tuple[torch.device, tuple[int, ...]], _Entry] = {}
# Tables of gradients that moved are of no more use.
_MOST = 64
# A graph reads what it was captured with for as long as it lives.
_CAPTURED: dict[int, Tensor] = {}
_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A process that is forked while another thread has it would wait for ever.
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


def table(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`numbers` as int64 on `device`.

    Kept, so that a step with the same addresses copies nothing; for threads and streams as well. In the capture of a
    CUDA graph nothing can be copied from the host: numbers that no step before has asked for, such as the addresses of
    gradients that the graph itself makes, are written one by one in each replay.
    """
    key = (device, tuple(numbers))
    on_gpu = device.type == "cuda"
    with _LOCK:
        entry = _TABLES.get(key)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            if entry is None:
                return _written(key[1], device)
            return _CAPTURED.setdefault(id(entry.table), entry.table)
        if entry is None:
            while len(_TABLES) >= _MOST:
                del _TABLES[next(iter(_TABLES))]
            entry = _TABLES[key] = _copied(key[1], device)
    if on_gpu:
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream != entry.stream and entry.copied is not None:
            stream.wait_event(entry.copied)
            entry.table.record_stream(stream)
    return entry.table


def _copied(numbers: tuple[int, ...], device: torch.device) -> _Entry:
    found = torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
    if device.type != "cuda":
        return _Entry(found, None, 0)
    stream, event = torch.cuda.current_stream(device), torch.cuda.Event()
    event.record(stream)
    return _Entry(found, event, stream.cuda_stream)


def _written(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Each number an argument of a kernel, so that it is a part of the graph."""
    found = torch.empty(len(numbers), dtype=torch.int64, device=device)
    for slot, number in zip(found, numbers):
        slot.fill_(number)
    return found
