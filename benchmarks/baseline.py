"""Regressions on a CPU: python -m benchmarks baseline [--op OP ...] [--write]

Measures one small case of every op (suite.SMALL) on one thread, in one process, and prints which ratios of our time to
the floor's are more than 15% above those in benchmarks/baselines/cpu.json. Ratios, as times belong to a machine, and of
process CPU time, which other processes disturb least; the median over rounds in which both take turns. What seems
slower is measured again, twice, and its least ratio counts. Prints and never fails: on another processor, or on one
that is busy, a ratio proves little, and the text says so. The tests hold results; this only holds their price.

--write makes the baselines anew: of each ratio the median of five measurements.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch

from benchmarks import harness, suite
from benchmarks.case import Case, Op
from effkern import native

PATH = Path(__file__).parent / "baselines" / "cpu.json"
SLOWER = 1.15
ATTEMPTS = 3
WRITE_ATTEMPTS = 5
LEAST_SECONDS = 0.005

Ratios = dict[str, float]
"""By variant: our time over the floor's."""


def ours(op: Op) -> list[str]:
    return [name for name in op.variants if name == op.ours or name.startswith("effkern ") or name == "effkern"]


def case_of(op: Op) -> Case:
    (case,) = harness.cases_of(op, harness.parse(op, [*suite.SMALL[op.name].split(), "--device=cpu"]))
    return case


def ratios(op: Op, case: Case, attempts: int, rounds: int) -> list[Ratios]:
    """Of one preparation, several times. The result is checked first."""
    op.check(case)
    p = harness.prepare(op, case, harness.with_floors(op, ours(op)))
    found = []
    for _ in range(attempts):
        _, extra = harness.measure(op, case, p, rounds, LEAST_SECONDS, warmup=1)
        kept = [*ours(op), *(name for name in p.sums if name.startswith("effkern"))]
        found.append({name: extra[name]["of_floor_cpu"] for name in kept if name in extra})
    return found


def machine() -> dict[str, Any]:
    return {**runner.machine(), "clone": native.cpu_clone()}


def held(path: Path) -> dict[str, Any]:
    """What the file holds of each op.

    Raises:
        ValueError: it is there and has no baselines.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())["ratios"]
        if isinstance(found, dict):
            return found
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"--file must hold baselines or not exist, got {path}: {error}") from None
    raise ValueError(f"--file must hold baselines or not exist, got {path}")


def write(path: Path, ops: list[str], rounds: int) -> None:
    old = held(path)
    new: dict[str, Any] = {}
    for name in ops:
        op = suite.load(name)
        case = case_of(op)
        found = ratios(op, case, WRITE_ATTEMPTS, rounds)
        middle = {variant: round(statistics.median(r[variant] for r in found), 4) for variant in found[0]}
        new[name] = {"case": case, "ratios": middle}
        print(f"{name}: {', '.join(f'{k} {v:.2f}' for k, v in middle.items())}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    both = dict(sorted({**old, **new}.items()))
    temporary.write_text(json.dumps({"machine": machine(), "ratios": both}, indent=1) + "\n")
    os.replace(temporary, path)


def doubts(recorded: dict[str, Any]) -> list[str]:
    """Why ratios may differ from the recorded ones without a reason in the code."""
    here, found = machine(), []
    for what in ("processor", "clone", "torch"):
        if here[what] != recorded.get(what):
            found.append(f"{what} is {here[what]}, that of the baselines {recorded.get(what)}")
    if (here["load"] or 0.0) > (here["cores"] or 1):
        found.append(f"load {here['load']:.1f} on {here['cores']} cores")
    return found


def compared(op: Op, recorded: dict[str, Any], rounds: int) -> list[tuple[str, float, float]]:
    """Variant, ratio before, and the least ratio of now."""
    case = case_of(op)
    if recorded["case"] != case:
        raise ValueError("its case is another one now; --write makes its baseline anew")
    before = recorded["ratios"]
    (now,) = ratios(op, case, 1, rounds)
    names = [name for name in before if name in now]
    if any(not now[name] <= SLOWER * before[name] for name in names):
        for again in ratios(op, case, ATTEMPTS - 1, rounds):
            now = {name: min(now[name], again[name]) for name in now}
    return [(name, before[name], now[name]) for name in names]


def check(path: Path, ops: list[str], rounds: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    recorded = json.loads(path.read_text())
    slower = 0
    print("| op | variant | baseline | now | now / baseline | |", "|" + "---|" * 6, sep="\n")
    for name in ops:
        if name not in recorded["ratios"]:
            print(f"| {name} | | | | | no baseline |", flush=True)
            continue
        if time.monotonic() > end:
            print(f"| {name} | | | | | not measured: {seconds:g} s are over |", flush=True)
            continue
        try:
            rows = compared(suite.load(name), recorded["ratios"][name], rounds)
        except (Exception, SystemExit) as error:
            print(f"| {name} | | | | | not measured: {error} |", flush=True)
            continue
        for variant, before, now in rows:
            note = "" if now <= SLOWER * before else "SLOWER"
            slower += bool(note)
            print(f"| {name} | {variant} | {before:.2f} | {now:.2f} | {now / before:.2f} | {note} |", flush=True)
    print(f"\n{slower} ratios more than {SLOWER - 1:.0%} above their baseline")
    for doubt in doubts(recorded["machine"]):
        print(f"to be read with care: {doubt}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks baseline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=sorted(suite.SMALL), default=sorted(suite.SMALL))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=50.0, help="no op is begun after so long")
    parser.add_argument("--file", type=Path, default=PATH, help="default: baselines/cpu.json beside this module")
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args(arguments)
    if a.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {a.rounds}")
    if a.write:
        # Before anything is measured.
        try:
            held(a.file)
        except ValueError as error:
            parser.error(str(error))
        if why := suite.refusal(a.file):
            parser.error(f"--file must be one that can be written, got {a.file}: {why}")
    torch.set_num_threads(1)
    runner.keep_memory()
    if a.write:
        write(a.file, a.op, a.rounds)
        return 0
    try:
        check(a.file, a.op, a.rounds, a.seconds)
    except (OSError, ValueError, KeyError) as error:
        print(f"benchmarks baseline: no usable baselines in {a.file}: {error}; --write makes them", file=sys.stderr)
    return 0
