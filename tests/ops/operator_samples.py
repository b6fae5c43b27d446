"""Arguments of every operator, as the small calls of the public ops give them."""

from functools import cache

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from tests.ops.inside import InsideOps
from tests.ops.op_calls import CALLS, CASES, Make

Samples = dict[str, list[tuple]]
# The others give impl="triton" to the operator that serves all implementations.
WITH_TRITON_OPERATORS = {
    "loop_step", "loop_step, normed", "loop_similarity", "mean_pool", "shampoo", "inverse_root, polar_express",
}  # fmt: skip


def _kind(x: object) -> object:
    """What makes two samples of an operator alike."""
    if isinstance(x, Tensor):
        return x.dtype, x.dim()
    return x if isinstance(x, (str, bool)) else type(x)


@cache
def operator_samples() -> Samples:
    """Of each operator the arguments before the call, one set of each kind."""
    found: dict[str, dict[tuple, tuple]] = {}

    def seen(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
        if op.namespace != "effkern":
            return
        assert not kwargs
        key = tuple(_kind(x) for x in tree_flatten(args)[0])
        copies = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, args)
        found.setdefault(op.name().removeprefix("effkern::"), {}).setdefault(key, copies)

    with InsideOps(seen):
        for name, impl in CASES:
            if impl != "triton" or name in WITH_TRITON_OPERATORS:
                CALLS[name].run(Make(), impl)
    return {name: list(kinds.values()) for name, kinds in found.items()}
