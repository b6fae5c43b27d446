"""One command line for every op's benchmark: python -m benchmarks OP [options], or python -m benchmarks.ops.OP.

Each case is checked against the reference first: no number on a wrong result. Then its variants take turns, round by
round; a short call is repeated for about a tenth of a second, and an op that memory bounds takes the next of several
sets of inputs each time, which together are larger than the cache.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch

from benchmarks.case import Case, Op, Prepared, Terms, add_axes, cases


def parser_of(op: Op) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {op.name}", description=op.doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_axes(op, parser)
    default = "cuda" if torch.cuda.is_available() and "cuda" in op.devices else op.devices[0]
    parser.add_argument("--device", choices=op.devices, default=default)
    parser.add_argument("--rounds", type=int, default=op.rounds)
    parser.add_argument("--threads", type=int, default=op.threads, help="0 leaves torch's number")
    parser.add_argument("--variants", nargs="+", choices=op.variants, metavar="VARIANT", help=", ".join(op.variants))
    parser.add_argument("--warm", action="store_true", help="the same inputs in every call, not beyond the cache")
    parser.add_argument("--fresh", action="store_true", help="leave malloc as it is: freed memory may be new again")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=op.memory, help="peak memory")
    parser.add_argument("--explain", action="store_true", help="what a case needs and what the op chooses; no timing")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--least", type=float, default=0.1, metavar="SECONDS", help="a call is repeated for so long")
    parser.add_argument("--only", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser


def missing(device: str) -> str | None:
    """Why nothing can run there."""
    if device == "cuda" and not torch.cuda.is_available():
        return "--device must be one that is there, got 'cuda', and torch sees none"
    return None


def with_floors(op: Op, wanted: Sequence[str]) -> list[str]:
    """The variants, and those that their floors need."""
    floors = {name for variant in wanted for name in op.floor_of(variant)}
    return [name for name in op.variants if name in wanted or name in floors or name in op.needs]


def names_of(op: Op, a: argparse.Namespace) -> list[str]:
    if a.variants:
        # The floor is needed for ratios whatever was asked for.
        return with_floors(op, a.variants)
    more = getattr(a, "more", None) or []
    return [name for name in op.variants if name not in op.optional or name in more]


def prepare(op: Op, case: Case, names: Sequence[str], warm: bool = False) -> Prepared:
    """The case's variants; where the op is bound by memory each of them goes through sets of inputs in turn."""
    first = op.prepare(case, names)
    if warm or not op.rotates or not first.held:
        return first
    count = min(runner.MOST_SETS, math.ceil(runner.ROTATE_BYTES / first.held))
    sets = [first, *(op.prepare(case, names) for _ in range(count - 1))]
    # No set's first call, which touches its memory for the first time, is timed.
    for p in sets:
        for run in p.variants.values():
            run()
    first.variants = {name: runner.rotating([p.variants[name] for p in sets]) for name in first.variants}
    for name in first.variants:
        first.extra.setdefault(name, {})["sets"] = count
    return first


def total(rounds: runner.Rounds, terms: Terms) -> list[tuple[float, float]]:
    """The sum of terms, round by round."""
    return [
        (sum(w * pair[0] for w, pair in zip(terms.values(), pairs)),
         sum(w * pair[1] for w, pair in zip(terms.values(), pairs)))
        for pairs in zip(*(rounds[name] for name in terms))
    ]  # fmt: skip


Measured = tuple[dict[str, runner.Timing], dict[str, dict[str, Any]]]


def measure(op: Op, case: Case, p: Prepared, rounds: int, least: float = 0.1, warmup: int = 2) -> Measured:
    """Times of each variant, and what else its line says: rates, ratios to the floor (medians over the rounds)."""
    runs = {name: runner.repeated(run, least) for name, run in p.variants.items()}
    found = runner.rounds_of({name: run for name, (run, _) in runs.items()}, rounds, warmup)
    found = {name: [(w / runs[name][1], c / runs[name][1]) for w, c in pairs] for name, pairs in found.items()}
    found |= {name: total(found, terms) for name, terms in p.sums.items() if terms.keys() <= found.keys()}
    timings = {name: runner.summary(pairs) for name, pairs in found.items()}
    extra: dict[str, dict[str, Any]] = {}
    for name, t in timings.items():
        work, floor = op.work_of(case, name), op.floor_of(name)
        more = {**({} if work is None else work.rates(t.wall)), **p.extra.get(name, {})}
        if floor.keys() <= found.keys():
            base = total(found, floor)
            more["floor"] = dict(floor)
            more["of_floor"] = statistics.median(x[0] / y[0] for x, y in zip(found[name], base))
            # A process clock may stand still for the shortest of calls.
            of_cpu = [x[1] / y[1] for x, y in zip(found[name], base) if y[1] > 0]
            more["of_floor_cpu"] = statistics.median(of_cpu) if of_cpu else None
        extra[name] = more
    return timings, extra


def peak_mib(op: Op, case: Case, variant: str, threads: int) -> float:
    """Memory of one variant beyond its inputs, and what it leaves behind, in a process of its own."""
    options = (f"--only={json.dumps(case)}", f"--device={case['device']}", f"--threads={threads}")
    return int(runner.in_fresh_process(op.module(), *options, f"--peak-of={variant}")) / 2**20


def reason_of(error: Exception) -> str:
    said = (getattr(error, "stderr", None) or "").strip().splitlines()
    return f"{type(error).__name__}: {error}{': ' + said[-1] if said else ''}"


def title(case: Case) -> str:
    return ", ".join(f"{k} {v}" for k, v in case.items())


def one_case(op: Op, case: Case, a: argparse.Namespace, names: Sequence[str]) -> None:
    torch.compiler.reset()
    op.check(case)
    p = prepare(op, case, names, a.warm)
    timings, extra = measure(op, case, p, a.rounds, a.least)
    for name in p.variants if a.memory or a.device == "cuda" else ():
        # Times that are taken already outlive a process that is killed for its memory.
        try:
            if a.device == "cuda":
                extra[name]["peak_mib"] = runner.peak_device_memory(p.variants[name]) / 2**20
            elif name not in op.floor_of(op.ours):
                extra[name]["peak_mib"] = peak_mib(op, case, name, torch.get_num_threads())
        except (subprocess.CalledProcessError, OSError, ValueError, LookupError, RuntimeError) as error:
            print(
                f"{op.name}: {title(case)}: no peak memory of {name}: {reason_of(error)}", file=sys.stderr, flush=True
            )
    if a.json:
        print("\n".join(runner.result_lines(op.name, case, timings, extra)), flush=True)
        return
    work = op.work(case)
    floor = " + ".join(name if w == 1.0 else f"{w:g} x {name}" for name, w in op.floor_of(op.ours).items())
    print(f"\n{title(case)}: {work.bytes / 1e6:.4g} MB, {work.flops / 1e9:.4g} GFLOP {work.dtype}; floor: {floor}")
    print(runner.table(timings, "", extra), flush=True)


def parse(op: Op, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(op)
    op.options(parser)
    a = parser.parse_args(arguments)
    if reason := missing(a.device):
        parser.error(reason)
    if a.rounds < 1 or a.threads < 0:
        parser.error(f"--rounds must be at least 1 and --threads at least 0, got {a.rounds} and {a.threads}")
    return a


def cases_of(op: Op, a: argparse.Namespace) -> list[Case]:
    return [a.only] if a.only else list(op.cases(a) if op.cases else cases(op, a))


def main(op: Op) -> None:
    runner.told(lambda: perform(op, parse(op)))


def perform(op: Op, a: argparse.Namespace) -> None:
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.peak_of:
        print(runner.peak_memory(lambda: op.prepare(a.only, [a.peak_of]).variants[a.peak_of]))
        return
    if op.instead(a):
        return
    if not a.fresh:
        runner.keep_memory()
    found = cases_of(op, a)
    if a.explain:
        from benchmarks.explain import explain

        return explain(op, found)
    if not a.json:
        print(json.dumps(runner.machine()))
    names = names_of(op, a)
    for case in found:
        one_case(op, case, a, names)
