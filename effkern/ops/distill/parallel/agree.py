"""What the ranks tell each other before their first call: options, and what is wrong with their arguments.

An error on one rank alone would leave the others waiting in a reduction for ever; so all of them hear of it and raise.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from effkern.ops.distill.parallel.chunks import Layout, Reductions

OP = "vocab_parallel_distill_loss"

# Chunk budgets that a group has agreed on, by what was compared. Ranks call in step, so they all find one or none.
_AGREED: WeakKeyDictionary[dist.ProcessGroup, dict[Any, int]] = WeakKeyDictionary()
MOST_AGREED = 256


def reductions(group: dist.ProcessGroup, sequence_parallel: bool) -> Reductions:
    """The reductions of a process group, each in place on its argument but for the last two."""

    def all_reduce(op: Any) -> Any:
        def reduce(x: Tensor) -> Tensor:
            dist.all_reduce(x, op, group=group)
            return x

        return reduce

    total = all_reduce(dist.ReduceOp.SUM)
    if not sequence_parallel:
        return Reductions(max=all_reduce(dist.ReduceOp.MAX), sum=total, scatter_rows=total)

    size = group.size()

    def gather(x: Tensor) -> Tensor:
        whole = x.new_empty(size * x.shape[0], x.shape[1])
        _single("all_gather")(whole, x.contiguous(), group=group)
        return whole

    def scatter(x: Tensor) -> Tensor:
        own = x.new_empty(x.shape[0] // size, x.shape[1])
        _single("reduce_scatter")(own, x, group=group)
        return own

    return Reductions(all_reduce(dist.ReduceOp.MAX), total, gather, scatter)


def _single(name: str) -> Any:
    """The collective on one tensor, under the name that this version of torch has for it."""
    old = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[name]
    return getattr(dist, f"{name}_single", None) or getattr(dist, old)


def _fail(rule: str, got: object) -> None:
    raise ValueError(f"{OP}: {rule}, got {got}")


def budget(
    group: dist.ProcessGroup,
    own: int,
    *,
    lasting: dict[str, Any],
    passing: dict[str, Any],
    error: Exception | None,
    check: bool,
) -> int:
    """The smallest of the ranks' chunk budgets; everything is compared over the group at the first call, or if `check`.

    Args:
        lasting: what has to be the same on every rank, and asks for a new comparison when it changes. Nothing in it may
            differ between the ranks by right: they would not find out together that it changed.
        passing: the same, but it may change from call to call without a comparison.
        error: what is wrong with this rank's own arguments.
    """
    known = _AGREED.setdefault(group, {})
    key = tuple(lasting.items())
    if not check and key in known:
        if error is not None:
            raise error
        return known[key]
    facts = {"error": error, "budget": own, "facts": {**lasting, **passing}}
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, facts, group=group)
    _raise_first(error, [other["error"] for other in every])
    for name in every[0]["facts"]:
        values = [other["facts"].get(name) for other in every]
        if any(value != values[0] for value in values):
            _fail(f"{name} must be the same on every rank of the group", f"by rank {values}")
    if len(known) >= MOST_AGREED:
        known.clear()
    known[key] = min(other["budget"] for other in every)
    return known[key]


def _raise_first(own: Exception | None, errors: list[Exception | None]) -> None:
    """This rank's own error, or the first one of the others."""
    if own is not None:
        raise own
    for rank, error in enumerate(errors):
        if error is not None:
            raise type(error)(f"{error} (on rank {rank})")


def raise_together(error: Exception | None, group: dist.ProcessGroup) -> None:
    """Raise on every rank what any of them has found."""
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, error, group=group)
    _raise_first(error, every)


def place(slices: tuple[int, ...], rank: int, vocab_valid: int | None, weight_rows: int, teacher_rows: int | None) -> (
    Layout
):  # fmt: skip
    """This rank's part of the vocabulary. Slices follow one another; padding is at the end of the last ones."""
    total = sum(slices)
    vocab = total if vocab_valid is None else vocab_valid
    if not 1 <= vocab <= total:
        _fail(f"vocab_valid must lie in [1, {total}], the rows of all slices of weight together", vocab)
    if weight_rows != slices[rank]:
        _fail(f"weight must have {slices[rank]} rows on rank {rank} as slices says", weight_rows)
    start = sum(slices[:rank])
    sizes = [min(max(vocab - sum(slices[:n]), 0), slices[n]) for n in range(len(slices))]
    # A teacher may be padded differently, but only after the last entry that counts.
    at_end = start + slices[rank] >= vocab
    if teacher_rows is not None and (teacher_rows < sizes[rank] or (teacher_rows != slices[rank] and not at_end)):
        rule = f"cover the same {slices[rank]} entries of the vocabulary as weight on rank {rank}"
        _fail(f"the teacher's slice must {rule}", teacher_rows)
    return Layout(min(start, vocab), sizes[rank], vocab, max(sizes))


def default_group() -> dist.ProcessGroup:
    """The group of all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"{OP}: group must be given, or torch.distributed be initialised, got neither")
    group = dist.group.WORLD
    assert group is not None
    return group


def label_sum(labels_N: Tensor) -> int:
    """A number that labels in another order, or other labels, hardly have."""
    place = torch.arange(1, labels_N.shape[0] + 1, device=labels_N.device)
    return int((labels_N.long() * place).sum())
