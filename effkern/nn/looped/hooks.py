"""A parameter's own hooks are for its one gradient at the end, and not for that of each loop."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def hooks_aside(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Without the hooks that torch.Tensor.register_hook has put on these.

    Threads that train one block, or blocks that share some of these, take turns: each would find, and keep, the hooks
    of the others.
    """
    with _turn(tensors):
        aside = [(x, dict(x._backward_hooks)) for x in tensors if x._backward_hooks]
        for x, _ in aside:
            x._backward_hooks.clear()  # type: ignore[union-attr]
        try:
            yield
        finally:
            for x, hooks in aside:
                x._backward_hooks.update(hooks)  # type: ignore[union-attr]


class _Turn:
    def __init__(self) -> None:
        # A core may hold a block, whose backward runs within this one.
        self.lock = threading.RLock()
        self.users = 0


# By tensor, as blocks may share some; for as long as some thread is there; modules with locks could not be copied.
_TURNS: dict[int, _Turn] = {}
_CHANGING = threading.Lock()


@contextmanager
def _turn(tensors: Sequence[Tensor]) -> Iterator[None]:
    # All threads in one order: none waits for a tensor of one that waits for its own.
    keys = sorted({id(x) for x in tensors})
    with _CHANGING:
        turns = [_TURNS.setdefault(key, _Turn()) for key in keys]
        for turn in turns:
            turn.users += 1
    held: list[_Turn] = []
    try:
        for turn in turns:
            turn.lock.acquire()
            held.append(turn)
        yield
    finally:
        for turn in held:
            turn.lock.release()
        with _CHANGING:
            for key, turn in zip(keys, turns):
                turn.users -= 1
                if not turn.users:
                    _TURNS.pop(key, None)


def _in_child() -> None:
    # Threads that had a turn are not in a process that was forked meanwhile, such as a DataLoader's worker.
    _TURNS.clear()
    _CHANGING.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_CHANGING.acquire, after_in_parent=_CHANGING.release, after_in_child=_in_child)
