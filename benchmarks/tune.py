"""Proposals for the launch tables of Triton kernels: python -m benchmarks.tune [--seconds 480] [--json FILE]

For every row of a table that a device can be asked about: the op is timed with the row as it is, then with each number
doubled and halved, one at a time, from the best so far, until nothing is faster by more than 3%. What does not compile
or does not fit is skipped, and what gives another result than the present row is an error. Nothing is edited: FILE gets
what was found, to be read by a person, who changes the table with the measurement in the commit.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, MutableMapping, MutableSequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

GAIN = 0.97
"""A change must take at most this share of the time."""
BOUND = 2e-2
"""Relative difference of results; sums in another order differ by rounding."""
ROUNDS = 7

Table = MutableSequence[Any] | MutableMapping[Any, Any]
Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Row:
    """One row of a table, and what exercises it."""

    module: str
    table: str
    """Name of the table in the module; "NAME[key]" for one of a dict of tables."""
    key: Any
    """Of the row in the table."""
    fields: dict[str, tuple[int, int]]
    """Numbers of the row that may change, with the least and the most."""
    make: Callable[[str], Run]
    """What is timed, on a device; it returns the results."""
    pair: bool = False
    """The row is a pair of a limit and the launch."""

    def place(self) -> Table:
        name, _, key = self.table.partition("[")
        table = getattr(importlib.import_module(self.module), name)
        return table[key.rstrip("]")] if key else table

    def get(self) -> Any:
        found = self.place()[self.key]
        return found[1] if self.pair else found

    def put(self, launch: Any) -> None:
        table: Any = self.place()
        table[self.key] = (table[self.key][0], launch) if self.pair else launch


class Proposal(NamedTuple):
    table: str
    present: dict[str, Any]
    proposed: dict[str, Any]
    present_ms: float
    proposed_ms: float
    tried: int


def neighbours(launch: Any, fields: dict[str, tuple[int, int]]) -> list[Any]:
    """The launch with one number doubled or halved, within its limits."""
    found = []
    for name, (least, most) in fields.items():
        for value in (getattr(launch, name) * 2, getattr(launch, name) // 2):
            if least <= value <= most:
                found.append(launch._replace(**{name: value}))
    return found


def difference(found: list[Tensor], want: list[Tensor]) -> float:
    errors = [
        ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item() for a, b in zip(found, want)
    ]
    return max(errors) if all(error == error for error in errors) else float("nan")


def seconds(row: Row, run: Run, first: Any, second: Any) -> tuple[float, float]:
    """Of both launches, in turn."""

    def with_launch(launch: Any) -> Callable[[], object]:
        def call() -> object:
            row.put(launch)
            return run()

        return call

    timings = runner.interleave({"first": with_launch(first), "second": with_launch(second)}, ROUNDS)
    return timings["first"].wall, timings["second"].wall


class Marker:
    """A row that may be compared with a size and read no further."""

    def __init__(self, launch: Any) -> None:
        self.limit = getattr(launch, "limit", 0)


def exercised(row: Row, run: Run) -> bool:
    """Whether a call reads the row at all."""
    present = row.get()
    row.put(Marker(present))
    try:
        run()
    except AttributeError as error:
        return Marker.__name__ in str(error)
    finally:
        row.put(present)
    return False


def tune(row: Row, device: str, deadline: float) -> Proposal:
    """The best launch found before the deadline; the table is as it was afterwards.

    Raises:
        RuntimeError: a launch gives another result than the present one, or the row is never read.
    """
    present = best = row.get()
    run = row.make(device)
    if not exercised(row, run):
        raise RuntimeError(f"tune: {row.table}: nothing reads row {row.key!r}")
    tried, ratio, present_ms = {present}, 1.0, 0.0
    try:
        want = [t.clone() for t in run()]
        present_ms = 1e3 * seconds(row, run, present, present)[0]
        moved = True
        while moved and time.monotonic() < deadline:
            moved = False
            for launch in neighbours(best, row.fields):
                if launch in tried or time.monotonic() >= deadline:
                    continue
                tried.add(launch)
                row.put(launch)
                try:
                    error = difference(run(), want)
                # Too many registers, too much shared memory, a tile no core takes: Triton has an exception for each.
                except Exception as reason:
                    print(f"{row.table}: {launch}: skipped: {type(reason).__name__}", file=sys.stderr, flush=True)
                    continue
                if not error <= BOUND:
                    raise RuntimeError(f"tune: {row.table}: {launch} gives another result, relative error {error:.1e}")
                was, now = seconds(row, run, best, launch)
                if now < GAIN * was:
                    best, ratio, moved = launch, ratio * now / was, True
    finally:
        row.put(present)
    return Proposal(
        f"{row.module}.{row.table}[{row.key!r}]", present._asdict(), best._asdict(), present_ms, ratio * present_ms,
        len(tried) - 1,
    )  # fmt: skip


# What exercises each row ----------------------------------------------------------------------------------------------


# On a CPU, in Triton's interpreter, a few rows show which row of a table is read.
FEW_ROWS, FEW_CHANNELS = 65, 256


def distill_rows(vocab: int, sparse: bool) -> Callable[[str], Run]:
    def make(device: str) -> Run:
        import effkern

        torch.manual_seed(0)
        rows = max(64, min(4096, (1 << 26) // vocab)) if device == "cuda" else 2
        hidden = torch.randn(rows, 64, device=device, requires_grad=True)
        weight = torch.randn(vocab, 64, device=device, requires_grad=True)
        labels = torch.randint(0, vocab, (rows,), device=device)
        teacher: Any = effkern.TeacherLogits(torch.randn(rows, vocab, device=device))
        if sparse:
            top = torch.randn(rows, vocab, device=device).log_softmax(-1).topk(16)
            teacher = effkern.TeacherTopK(top.indices, top.values, "tail_bucket")

        def run() -> list[Tensor]:
            result = effkern.linear_distill_loss(
                hidden, weight, labels, teacher=teacher, omega=0.5, temperature=1.0, teacher_temperature=1.0,
                impl="triton",
            )  # fmt: skip
            return [result.loss.detach(), *torch.autograd.grad(result.loss, (hidden, weight))]

        return run

    return make


def sizes(device: str, rows: int) -> tuple[int, int]:
    return (rows, 2048) if device == "cuda" else (min(rows, FEW_ROWS), FEW_CHANNELS)


def laurel(rank: int, rows: int, dtype: torch.dtype, backward: bool) -> Callable[[str], Run]:
    def make(device: str) -> Run:
        import effkern

        torch.manual_seed(0)
        count, dim = sizes(device, rows)
        f, x = (torch.randn(count, dim, device=device, dtype=dtype).requires_grad_(backward) for _ in range(2))
        weight = torch.ones(dim, device=device, dtype=dtype)
        down = torch.randn(dim, rank, device=device, dtype=dtype) / dim**0.5 if rank else None
        up = torch.randn(rank, dim, device=device, dtype=dtype) / rank**0.5 if rank else None

        def run() -> list[Tensor]:
            out = effkern.laurel_residual(f, x, down=down, up=up, norm_weight=weight, impl="triton")
            assert out.normed is not None
            if not backward:
                return [out.y, out.normed]
            return [out.y.detach(), *torch.autograd.grad(out.normed.sum() + out.y.sum(), (f, x))]

        return run

    return make


def loop_step(rows: int, backward: bool) -> Callable[[str], Run]:
    def make(device: str) -> Run:
        import effkern

        torch.manual_seed(0)
        count, dim = sizes(device, rows)
        f, h, e = (torch.randn(count, dim, device=device).requires_grad_(backward) for _ in range(3))
        weight = torch.ones(dim, device=device)

        def run() -> list[Tensor]:
            out = effkern.loop_step(f, h, e, norm_weight=weight, impl="triton")
            found = [t for t in out if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
            if not backward:
                return found
            wanted = [t.sum() for t in found if t.requires_grad]
            return list(torch.autograd.grad(wanted, (f, h, e)))

        return run

    return make


def shampoo_product(side: int) -> Callable[[str], Run]:
    def make(device: str) -> Run:
        from effkern.ops.shampoo.triton import product

        torch.manual_seed(0)
        order = min(side, 1024)
        A = torch.randn(36 if device == "cuda" else 1, order, order, device=device)
        return lambda: [product(A, A, precision="tf32x3")]

    return make


def rows_of_tables() -> list[Row]:
    """Every row that is known to be exercised by something above."""
    from effkern.ops.distill import triton_launch as distill
    from effkern.ops.laurel import triton_launch as residual
    from effkern.ops.shampoo import triton as shampoo

    found = []
    for name, sparse in (("DENSE_LAUNCH", False), ("SPARSE_LAUNCH", True)):
        for i, launch in enumerate(getattr(distill, name)):
            last = launch.limit > 1 << 20
            # A shorter block than the limit is another kernel: rows are then read again.
            block = (512, 16384) if last else (launch.block, launch.block)
            fields = {"block": block, "warps": (2, 32), "registers": (64, 255)}
            vocab = 128256 if last else launch.limit
            found.append(Row(distill.__name__, name, i, fields, distill_rows(vocab, sparse)))
    for table, launches in residual.TABLES.items():
        direction, _, wide = table.partition("_")
        if table == "decode_float32":
            continue
        for i, launch in enumerate(launches):
            # The smallest rank that is too wide for the row before.
            before = launches[i - 1].limit if i else 0
            rank = 2 * before or min(launch.limit, 64)
            fields = {"rows": (1, 64), "block": (16, 4096), "warps": (2, 16), "stages": (1, 6)}
            count = 32 if direction == "decode" else 8192
            dtype = torch.float32 if wide else torch.bfloat16
            made = laurel(rank, count, dtype, direction == "backward")
            found.append(Row(residual.__name__, f"TABLES[{table}]", i, fields, made))
    fields = {"rows": (1, 64), "block": (64, 4096), "warps": (1, 16)}
    for key, count in (("forward", 8192), ("decode", 32), ("backward", 8192)):
        module = "effkern.ops.loop_step.triton"
        found.append(Row(module, "LAUNCHES", key, fields, loop_step(count, key == "backward")))
    for i, (limit, _) in enumerate(shampoo.LAUNCHES):
        fields = {"block": (16, 128), "depth": (16, 64), "warps": (2, 16), "stages": (1, 5)}
        found.append(Row(shampoo.__name__, "LAUNCHES", i, fields, shampoo_product(limit), pair=True))
    return found


def write(path: Path, device: str, proposals: list[Proposal], failed: dict[str, str]) -> None:
    whole = {"device": device, **runner.machine(), "proposals": [p._asdict() for p in proposals], "failed": failed}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(whole, indent=1) + "\n")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="of all tables together")
    parser.add_argument("--json", type=Path, default=Path("launches.json"), metavar="FILE")
    a = parser.parse_args(arguments)
    if a.seconds <= 0:
        parser.error(f"--seconds must be positive, got {a.seconds:g}")
    if not torch.cuda.is_available():
        print("tune: this machine must have a CUDA device; torch sees none", file=sys.stderr)
        return 2
    rows, start = rows_of_tables(), time.monotonic()
    proposals: list[Proposal] = []
    failed: dict[str, str] = {}
    for i, row in enumerate(rows):
        left = a.seconds - (time.monotonic() - start)
        if left <= 0:
            failed[f"{row.module}.{row.table}[{row.key!r}]"] = "no time was left"
            continue
        try:
            # Each of those that remain may take its share of the time that remains.
            p = tune(row, "cuda", time.monotonic() + left / (len(rows) - i))
        except Exception as error:
            failed[f"{row.module}.{row.table}[{row.key!r}]"] = f"{type(error).__name__}: {error}"
        else:
            proposals.append(p)
            gain = p.proposed_ms / p.present_ms
            print(
                f"{p.table}: {p.present} -> {p.proposed}: {gain:.2f} of {p.present_ms:.3f} ms, {p.tried} tried",
                flush=True,
            )
        write(a.json, torch.cuda.get_device_name(), proposals, failed)
    for name, reason in failed.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return 1 if any(reason != "no time was left" for reason in failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
