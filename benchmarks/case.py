"""What an op's benchmark declares: its sizes, the work that no implementation avoids, a check, and what takes turns."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any, NamedTuple

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip  # noqa: F401

import torch
from torch import Tensor

Case = dict[str, Any]
Run = Callable[[], object]
Terms = Mapping[str, float]
"""A sum of variants: weight by name."""


@dataclass(frozen=True)
class Work:
    """Bytes that must be read or written once, and FLOPs (a multiply-add is two) of products of matrices of `dtype`.

    Time T on a machine that copies B bytes/s and multiplies F FLOP/s is at least max(bytes / B, flops / F).
    """

    bytes: float
    flops: float = 0.0
    dtype: str = "float32"

    def rates(self, seconds: float) -> dict[str, Any]:
        """What a result line says."""
        return {
            "bytes": int(self.bytes),
            "flops": int(self.flops),
            "flop_dtype": self.dtype,
            "gb_per_s": self.bytes / seconds / 1e9,
            "tflop_per_s": self.flops / seconds / 1e12,
        }


@cache
def compiled(function: Callable) -> Callable:
    """The function under torch.compile, whose import waits for the first call."""
    return torch.compile(function, dynamic=False)


def num_bytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def item_bytes(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


@dataclass
class Prepared:
    """One case, ready to run."""

    variants: dict[str, Run]
    held: int = 0
    """Bytes that a call reads and the next one would find in the cache."""
    sums: dict[str, Terms] = field(default_factory=dict)
    """Further variants whose times are sums of those above."""
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What else the result line of a variant says."""


class Axis(NamedTuple):
    """One size or kind: field of the case, option that sets it, its values unless told."""

    field: str
    option: str
    values: Sequence[Any]
    choices: Sequence[Any] | None = None
    help: str | None = None


class Scaling(NamedTuple):
    """Cost against one field over four octaves and more; the rest of the case stays."""

    field: str
    values: Sequence[int]
    case: Case
    why: str
    """The exponent that is expected, and why."""


class Huge(NamedTuple):
    """A call with more than 2^31 elements: its bytes, what it is, and a run that raises where the result is wrong."""

    bytes: int
    what: str
    run: Callable[[], None]


@dataclass(frozen=True)
class Op:
    """An op's benchmark. `check` and `prepare` take a case, whose fields are the axes and the device."""

    name: str
    doc: str
    axes: Sequence[Axis]
    variants: Sequence[str]
    check: Callable[[Case], None]
    """Raises WrongResult where the op is wrong on a small case of this kind."""
    prepare: Callable[[Case, Sequence[str]], Prepared]
    """Builds the named variants of `variants`; those that it cannot build it leaves out, and says why."""
    work: Callable[[Case], Work]
    floor: Terms | Callable[[str], Terms]
    """What times are held against, per variant or the same for all."""
    works: Callable[[Case], Mapping[str, Work | None]] = lambda case: {}
    """Variants that do something else than `work`; None: no rates for it."""
    ours: str = "effkern"
    needs: Sequence[str] = ()
    """Variants that floors are sums of."""
    optional: Sequence[str] = ()
    """Variants that only run when asked for."""
    registry: Sequence[str] = ()
    """Names in effkern.ops.registry."""
    why: Callable[[Case], list[str]] = lambda case: []
    """What the op itself chooses for this case, and why."""
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    """Adds options of its own."""
    instead: Callable[[argparse.Namespace], bool] = lambda a: False
    """Does what they ask for; where it says so, nothing is timed."""
    cases: Callable[[argparse.Namespace], Iterator[Case]] | None = None
    """All combinations of the axes unless told."""
    rotates: bool = False
    """Bound by memory: every call takes the next of several sets of inputs (runner.ROTATE_BYTES)."""
    devices: Sequence[str] = ("cpu", "cuda")
    rounds: int = 9
    threads: int = 2
    memory: bool = False
    """Whether peak memory is measured unless told."""
    scaling: Sequence[Scaling] = ()
    huge: Callable[[], Huge] | None = None
    no_huge: str = ""
    """Why there is no such call."""

    def floor_of(self, variant: str) -> Terms:
        return self.floor(variant) if callable(self.floor) else self.floor

    def module(self) -> str:
        return f"benchmarks.ops.{self.name}"

    def work_of(self, case: Case, variant: str) -> Work | None:
        works = self.works(case)
        return works[variant] if variant in works else self.work(case)


def cases(op: Op, a: argparse.Namespace) -> Iterator[Case]:
    """All combinations of the axes' values."""
    chosen = [getattr(a, axis.field) for axis in op.axes]
    for values in product(*(v if isinstance(v, list) else [v] for v in chosen)):
        yield {**dict(zip((axis.field for axis in op.axes), values)), "device": a.device}


def add_axes(op: Op, parser: argparse.ArgumentParser) -> None:
    for axis in op.axes:
        default = list(axis.values)
        if default[0] is False:
            parser.add_argument(axis.option, dest=axis.field, action="store_true", help=axis.help)
            continue
        parser.add_argument(
            axis.option, dest=axis.field, nargs="+", type=type(default[0]), default=default, choices=axis.choices,
            help=axis.help,
        )  # fmt: skip


class WrongResult(SystemExit):
    """No number on a wrong result."""


def hold(pairs: Iterable[tuple[Tensor, Tensor]], bound: float) -> None:
    """Relative errors in the Frobenius norm against results in float64.

    Raises:
        WrongResult: one is above `bound` or is NaN.
    """
    for got, want in pairs:
        error = ((got.double() - want).norm() / want.norm()).item()
        if not error <= bound:
            raise WrongResult(f"wrong result: relative error {error:.1e} > {bound:.0e}; nothing is timed")


def bound_of(dtype: str, exact: float = 1e-5, half: float = 2e-2) -> float:
    return exact if dtype in ("float32", "float64") else half


def passes(
    which: str, function: Callable[[], Sequence[Tensor]], used: Sequence[Tensor], grads: Sequence[Tensor]
) -> Run:
    """`forward` alone as inference has it, or `both`: also the gradients of `used` from those of the first results."""
    if which == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function()

        return forward
    return lambda: torch.autograd.grad(function()[: len(grads)], used, grads)
