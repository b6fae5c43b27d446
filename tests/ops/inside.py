"""A look inside the ops: every call of an `effkern::` operator, those that other operators' kernels make included."""

from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode

from effkern import native

Seen = Callable[[torch._ops.OpOverload, tuple, dict], None]


class InsideOps(TorchDispatchMode):
    """Calls `seen(op, args, kwargs)` before each operator, and runs the kernels of ours for `key` under this very mode.

    A mode sees the outermost operator alone, as its kernel runs below the mode; going on to the kernel by hand keeps
    the mode above it. Under FakeTensorMode the kernel of an operator that is written in Python then runs on fake
    tensors, where the operator's shape function would have stood for it.
    """

    def __init__(self, seen: Seen, key: DispatchKey = DispatchKey.CPU) -> None:
        super().__init__()
        self.seen, self.key = seen, key

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen(func, args, kwargs)
        if not self._is_ours(func, args):
            return func(*args, **kwargs)
        with self:
            return func.redispatch(DispatchKeySet(self.key), *args, **kwargs)

    def _is_ours(self, func: Any, args: Any) -> bool:
        """Triton's kernels call no operators of ours, and its interpreter is slow under a mode."""
        if func.namespace != "effkern" or func.name().removeprefix("effkern::") in native.COMPILED:
            return False
        if self.key == DispatchKey.CPU and (
            "triton" in func.name() or any(x == "triton" for x in args if isinstance(x, str))
        ):
            return False
        return torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), self.key.name)
