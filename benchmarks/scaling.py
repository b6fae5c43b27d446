"""Cost against size for every op: python -m benchmarks scaling [--op OP ...] [--huge] [--json FILE]

Each op declares what grows (benchmarks/ops), over four octaves and more; the sizes take turns, round by round. Printed
are the process CPU times (medians), which other work disturbs least, and the exponent b of t = a n^b, the slope of the
least-squares line through (log n, log t), with its standard error sqrt(sum r^2 / (m - 2) / sum (x - mean x)^2) for m
sizes and residuals r; and the slope between the two largest sizes, where what a call costs besides its arithmetic
weighs least.

--huge calls every op with more than 2^31 elements, where 32-bit offsets would overflow, and checks the last of them;
it leaves out what needs more than HUGE_SHARE of the memory that is free.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch

from benchmarks import harness, suite
from benchmarks.case import Op, Scaling, WrongResult

# Results and inputs in several copies, and other users of the machine.
HUGE_SHARE = 0.5


class Fit(NamedTuple):
    exponent: float
    error: float
    """Standard error of the exponent."""
    last: float
    """Between the two largest sizes."""


def fit(sizes: Sequence[float], times: Sequence[float]) -> Fit:
    """Least squares on logarithms; at least three sizes.

    Raises:
        ValueError: fewer, no two different, or a number that is not above 0.
    """
    if len(sizes) != len(times) or len(sizes) < 3 or len(set(sizes)) < 2:
        raise ValueError(
            f"fit: sizes must be three or more, not all the same, with a time each, got {sizes!r}, {times!r}"
        )
    if not all(v > 0 for v in (*sizes, *times)):
        raise ValueError("fit: sizes and times must be > 0")
    x, y = [math.log(n) for n in sizes], [math.log(t) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    square = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / square
    residual = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y))
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return Fit(slope, math.sqrt(residual / (len(x) - 2) / square), last)


def complete(op: Op, given: dict[str, Any]) -> dict[str, Any]:
    """The case, with defaults for axes that it does not name."""
    return {**{axis.field: axis.values[0] for axis in op.axes}, **given, "device": "cpu"}


def measure(op: Op, s: Scaling, rounds: int, least: float) -> tuple[list[runner.Timing], Fit]:
    """Times of our own variant at each size, in turn."""
    cases = [complete(op, {**s.case, s.field: value}) for value in s.values]
    op.check(cases[0])
    runs: dict[str, Callable[[], object]] = {}
    counts = []
    # An op whose call is a sum of parts runs them one after the other.
    names = [name for name in op.variants if name == op.ours] or [n for n in op.variants if n.startswith("effkern")]
    for value, case in zip(s.values, cases):
        made = harness.prepare(op, case, harness.with_floors(op, names)).variants
        call = [made[name] for name in names]
        run, count = runner.repeated(lambda call=call: [part() for part in call], least)  # type: ignore[misc]
        runs[str(value)] = run
        counts.append(count)
    timings = runner.interleave(runs, rounds, 1)
    each = [runner.Timing(*(v / n for v in (t.wall, t.wall_low, t.wall_high, t.cpu)))
            for t, n in zip(timings.values(), counts)]  # fmt: skip
    return each, fit(s.values, [t.cpu for t in each])


def available_memory() -> int:
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable:"))


def huge(op: Op) -> str:
    """What became of the call with more than 2^31 elements."""
    if op.huge is None:
        return f"{op.name}: none: {op.no_huge}"
    h = op.huge()
    limit = int(HUGE_SHARE * available_memory())
    size = f"{op.name}: {h.what}, {h.bytes / 2**30:.1f} GiB"
    if h.bytes > limit:
        return f"{size}: left out, as {HUGE_SHARE:g} of the free memory is {limit / 2**30:.1f} GiB"
    start = time.monotonic()
    try:
        h.run()
    except WrongResult as error:
        return f"{size}: FAILED: {error}"
    return f"{size}: right in {time.monotonic() - start:.0f} s"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=sorted(suite.SMALL), default=sorted(suite.SMALL))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--least", type=float, default=0.02, metavar="SECONDS", help="a call is repeated for so long")
    parser.add_argument("--huge", action="store_true", help="calls of more than 2^31 elements instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON object per size")
    a = parser.parse_args(arguments)
    if a.rounds < 1 or a.threads < 1:
        parser.error(f"--rounds and --threads must be at least 1, got {a.rounds} and {a.threads}")
    if a.json and (why := suite.refusal(a.json)):
        parser.error(f"--json must be a file that can be written, got {a.json}: {why}")
    torch.set_num_threads(a.threads)
    if a.huge:
        failed = 0
        for name in a.op:
            print(said := huge(suite.load(name)), flush=True)
            failed += "FAILED" in said
        return 1 if failed else 0
    runner.keep_memory()
    print(json.dumps(runner.machine()))
    print(
        "| op | against | sizes | CPU ms | exponent | last octave | expected |", "|" + "---|" * 7, sep="\n", flush=True
    )
    lines = []
    for name in a.op:
        op = suite.load(name)
        for s in op.scaling:
            try:
                timings, found = measure(op, s, a.rounds, a.least)
            except WrongResult:
                raise
            except SystemExit as error:
                print(f"| {name} | {s.field} | left out: {error} | | | | |", flush=True)
                continue
            sizes, ms = " ".join(map(str, s.values)), " ".join(f"{1e3 * t.cpu:.3g}" for t in timings)
            slope = f"{found.exponent:.2f} +- {found.error:.2f} | {found.last:.2f}"
            print(f"| {name} | {s.field} | {sizes} | {ms} | {slope} | {s.why} |", flush=True)
            for value, t in zip(s.values, timings):
                case = complete(op, {**s.case, s.field: value})
                what = {"benchmark": "scaling", "case": {"op": name, "against": s.field, **case}, "variant": op.ours}
                lines.append({**what, **asdict(t), **found._asdict(), **runner.machine()})
            if a.json:
                suite.write(a.json, [json.dumps(line) for line in lines])
    return 0
