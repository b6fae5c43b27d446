"""A parameter's own hooks are for its one gradient at the end, and not for that of each loop."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def hooks_aside(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Without the hooks that torch.Tensor.register_hook has put on these.

    Threads that train one block take turns: each would find, and keep, the hooks of the others.
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
        # A core may hold a block with the same first parameter, whose backward runs within this one.
        self.lock = threading.RLock()
        self.users = 0


# By the first parameter of a block, for as long as some thread is there; modules with locks could not be copied.
_TURNS: dict[int, _Turn] = {}
_CHANGING = threading.Lock()


@contextmanager
def _turn(tensors: Sequence[Tensor]) -> Iterator[None]:
    if not tensors:
        yield
        return
    key = id(tensors[0])
    with _CHANGING:
        turn = _TURNS.setdefault(key, _Turn())
        turn.users += 1
    try:
        with turn.lock:
            yield
    finally:
        with _CHANGING:
            turn.users -= 1
            if not turn.users:
                del _TURNS[key]
