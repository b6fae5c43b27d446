"""A parameter's own hooks are for its one gradient at the end, and not for that of each loop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def hooks_aside(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Without the hooks that torch.Tensor.register_hook has put on these."""
    aside = [(x, dict(x._backward_hooks)) for x in tensors if x._backward_hooks]
    for x, _ in aside:
        x._backward_hooks.clear()  # type: ignore[union-attr]
    try:
        yield
    finally:
        for x, hooks in aside:
            x._backward_hooks.update(hooks)  # type: ignore[union-attr]
