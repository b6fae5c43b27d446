"""Where the factors live: one stack of same-size factors for many parameters; the state of each is a view of it.

A family is a set of blocks of one shape with the same sides: one call for their Gram products and one for their update.
A bucket stacks the factors of one size and exponent, of whatever families: one call for all their roots.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effkern.optim.shampoo import blocks
from effkern.optim.shampoo.adamw import Plain
from effkern.optim.shampoo.options import exponents_of, sides_of
from effkern.optim.shampoo.saved import reorder
from effkern.optim.shampoo.sharded import Layout, is_sharded, layout_of, local, same_device_zeros


@dataclass(eq=False)
class Entry:
    """A parameter that Shampoo steps, with its state."""

    name: str
    parameter: Tensor
    state: dict[str, Any]
    order: tuple[int, ...]
    shape: tuple[int, int]
    left: bool
    right: bool
    layout: Layout | None
    sharded: bool
    """Whether it is a DTensor, whole or in parts."""
    step: int = 0
    """The number in state["step"], where no device is asked."""
    strides: tuple[int, ...] = ()
    """Of the local part of its states, in memory as the parameter is, without gaps."""


class Bucket:
    """A stack of factors of one size."""

    def __init__(self, size: int, exponent: float) -> None:
        self.size, self.exponent, self.count = size, exponent, 0
        self.names: list[str] = []
        self.late: set[int] = set()
        """Those whose factor was zero when their root was due: known on the CPU alone, as reading it waits."""

    def reserve(self, names: list[str]) -> int:
        """First place of blocks that belong to the parameters `names`."""
        first = self.count
        self.names += names
        self.count += len(names)
        return first

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Factors zero; roots the identity, so that a block without a root yet moves along its momentum."""
        shape = (self.count, self.size, self.size)
        self.factor = torch.zeros(shape, dtype=dtype, device=device)
        self.root = torch.eye(self.size, dtype=dtype, device=device).expand(shape).clone()
        self.failures = torch.zeros(self.count, dtype=torch.int32, device=device)

    def _empty(self, first: int, last: int) -> set[int]:
        """Those of [first, last) whose factor is zero."""
        filled = self.factor[first:last].diagonal(dim1=1, dim2=2).any(dim=1)
        return {first + i for i, full in enumerate(filled.tolist()) if not full}

    def note(self, first: int, last: int) -> None:
        """Roots of [first, last) were due: those without a factor will be as soon as they have one."""
        if self.factor.device.type == "cpu":
            self.late = (self.late - set(range(first, last))) | self._empty(first, last)

    def ready(self, first: int, last: int) -> list[int]:
        """Late ones of [first, last) that have a factor by now."""
        some = {i for i in self.late if first <= i < last}
        return sorted(some - self._empty(min(some), max(some) + 1)) if some else []


@dataclass(eq=False)
class Family:
    """Blocks of one shape, in one order, contiguous in their buckets."""

    m: int
    n: int
    layout: Layout | None
    left: Bucket | None = None
    right: Bucket | None = None
    left_first: int = 0
    right_first: int = 0
    owners: list[Entry] = field(default_factory=list)
    cuts: list[blocks.Block] = field(default_factory=list)
    places: list[tuple[Entry, str, int, int]] = field(default_factory=list)
    """Entry, suffix of its state's keys, and its range of blocks."""

    def add(self, entry: Entry, suffix: str, cuts: list[blocks.Block]) -> None:
        first = len(self.cuts)
        self.cuts += cuts
        self.owners += [entry] * len(cuts)
        self.places.append((entry, suffix, first, len(self.cuts)))

    @property
    def gathered(self) -> bool:
        return self.layout is not None and self.layout.kind == "gather"

    def allocate(self, device: torch.device) -> None:
        """Gradients in a row that were not finite, as seen by the left and the right Gram product and by the update."""
        self.bad = torch.zeros(3, len(self.cuts), dtype=torch.int32, device=device)


@dataclass(eq=False)
class Plan:
    """What a step of one parameter group does, apart from the gradients."""

    entries: list[Entry]
    families: list[Family]
    buckets: list[Bucket]
    plain: list[Plain]
    """What AdamW steps, by device."""
    on_cpu: bool
    """Whether all of it is there, so that counters can be read without waiting."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of the state: float64 for float64 parameters, else float32."""
    return torch.promote_types(dtype, torch.float32)


def make_entry(group: dict[str, Any], parameter: Tensor, name: str, state: dict[str, Any]) -> Entry:
    rows, cols = shape = blocks.matrix_shape(tuple(parameter.shape))
    left, right = sides_of(group["side"], rows, cols)
    order = blocks.memory_order(local(parameter))
    own = local(parameter)
    if own.dim() > 2:
        try:
            own.permute(order).view(blocks.matrix_shape(tuple(own.shape)))
        except RuntimeError:
            raise ValueError(
                f"Shampoo: {name} must lie in memory so that it is a matrix of its first dimension by the others, got "
                f"shape {tuple(own.shape)} with strides {own.stride()}"
            ) from None
    layout = layout_of(parameter, name, left, right)
    entry = Entry(name, parameter, state, order, shape, left, right, layout, is_sharded(parameter))
    entry.strides = torch.empty_like(own, device="meta").stride()
    if "step" in state:
        entry.step = int(state["step"])
    return entry


def slot(entry: Entry, key: str, dtype: torch.dtype) -> Tensor:
    """A state tensor of the parameter's shape, laid out in memory as the parameter is, in `dtype`."""
    found = entry.state.get(key)
    if found is None or found.dtype != dtype or local(found).stride() != entry.strides:
        fresh = same_device_zeros(entry.parameter, dtype)
        if found is not None:
            local(fresh).copy_(local(found))
        entry.state[key] = found = fresh
    return found


def _local_cuts(entry: Entry, cuts: list[blocks.Block]) -> list[blocks.Block]:
    """Blocks of the local part, where the side that is not preconditioned is shared out."""
    if entry.layout is None or entry.layout.kind != "reduce":
        return cuts
    rows, cols = blocks.as_matrix(local(entry.parameter), entry.order).shape
    return [c._replace(m=rows) if entry.layout.dim == 0 else c._replace(n=cols) for c in cuts]


def build(group: dict[str, Any], entries: list[Entry], others: list[tuple[str, Tensor, dict[str, Any]]]) -> Plan:
    """Families and buckets of the entries; factors that are in their states already move into the buckets."""
    plain: dict[torch.device, Plain] = {}
    for member in others:
        plain.setdefault(member[1].device, Plain(member[1].device)).members.append(member)
    for some in plain.values():
        some.allocate()
    for e in entries:
        reorder(group, e.parameter, e.name, e.state)
        e.state.setdefault("step", torch.zeros((), dtype=torch.float32))
    families: dict[Any, Family] = {}
    for e in entries:
        place = (e.left, e.right, e.layout, e.parameter.device, e.parameter.dtype)
        pieces = blocks.split(*e.shape, group["block_size"], e.left, e.right)
        for number, ((m, n), cuts) in enumerate(pieces.items()):
            family = families.setdefault((m, n, *place), Family(m, n, e.layout))
            family.add(e, f".{number}" if number else "", _local_cuts(e, cuts))
    buckets: dict[Any, Bucket] = {}
    for (m, n, left, right, _, device, dtype), family in families.items():
        names = [e.name for e in family.owners]
        a, b = exponents_of(group, left, right)
        if left:
            family.left = buckets.setdefault((m, a, device, wide(dtype)), Bucket(m, a))
            family.left_first = family.left.reserve(names)
        if right:
            family.right = buckets.setdefault((n, b, device, wide(dtype)), Bucket(n, b))
            family.right_first = family.right.reserve(names)
        family.allocate(device)
    for (_, _, device, dtype), bucket in buckets.items():
        bucket.allocate(dtype, device)
    for family in families.values():
        _bind(family, group["start_step"])
    devices = {e.parameter.device.type for e in entries} | {d.type for d in plain}
    return Plan(entries, list(families.values()), list(buckets.values()), list(plain.values()), devices <= {"cpu"})


def _bind(family: Family, start_step: int) -> None:
    """Make the states views of the buckets."""
    for side, bucket, first in (
        ("left", family.left, family.left_first),
        ("right", family.right, family.right_first),
    ):
        if bucket is None:
            continue
        for entry, suffix, start, end in family.places:
            for name, stack in (("", bucket.factor), ("_root", bucket.root)):
                view, key = stack[first + start : first + end], side + name + suffix
                if key in entry.state:
                    view.copy_(entry.state[key])
                entry.state[key] = view
            if entry.step >= start_step:
                bucket.note(first + start, first + end)
