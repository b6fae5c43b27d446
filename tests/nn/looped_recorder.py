"""A CPU stand-in for CUDA graphs: operations on fixed memory, recorded once, repeated without the body's Python.

As with a graph, numbers that Python has read are built in, memory is read and written where it was, and nothing runs
that was not recorded. Buffers that the body has made are kept, as a graph's pool keeps them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


class RecordingRecorder:
    """`record` runs the body as often as warm-ups would, then writes down one more run."""

    def __init__(self, warmups: int = 3) -> None:
        self.warmups = warmups
        self.recordings = 0
        self.replays = 0

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        for _ in range(self.warmups):
            body()
        with _Log() as log:
            body()

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, out in log.calls:
                    _write(func(*args, **kwargs), out, (args, kwargs))

        return replay


def _write(new: Any, old: Any, inputs: Any) -> None:
    """To where the result was; views of inputs, and inputs written in place, are there already."""
    known = {x.untyped_storage().data_ptr() for x in tree_leaves(inputs) if isinstance(x, Tensor)}
    for a, b in zip(tree_leaves(new), tree_leaves(old), strict=True):
        if isinstance(b, Tensor) and b.untyped_storage().data_ptr() not in known and b.numel():
            b.detach().copy_(a)
