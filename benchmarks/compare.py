"""Two measurements of the same cases: python -m benchmarks compare BEFORE AFTER [--floor VARIANT] [--slower 1.15]

Compares ratios, not times, because machines and their load differ: each variant's wall time over its floor's where both
files say it (of_floor, the median over rounds), else over that of a variant both have in the same case (by default the
first that is not ours). Under the table stands what BEFORE has and AFTER has not. Exit status 1 if the ratio of one of
ours grew by more than `--slower`, 2 if the files have no case in common or one of them is broken.
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path

from benchmarks import lines
from benchmarks.targets import Cases, gathered

# Ours beside Op.ours and what is named effkern.
MORE_OURS = {"gemm_bf16": {"first", "add"}}


@cache
def our_names(benchmark: str) -> set[str]:
    from benchmarks import suite

    named = {suite.load(benchmark).ours} if benchmark in suite.SMALL else set()
    return named | MORE_OURS.get(benchmark, set())


def is_ours(benchmark: str, name: str) -> bool:
    return name.startswith(("effkern", "ours")) or name in our_names(benchmark)


def floor_of(benchmark: str, names: list[str], floor: str | None) -> str | None:
    if floor is not None:
        return floor if floor in names else None
    return next((name for name in names if not is_ours(benchmark, name)), None)


def changes(before: Cases, after: Cases, floor: str | None) -> list[tuple[str, str, str, float, float]]:
    """Benchmark, case, variant, and its ratio to the floor before and after, of all that both have."""
    found = []
    for benchmark, cases in after.items():
        for case, variants in cases.items():
            old = before.get(benchmark, {}).get(case, {})
            both = [name for name in variants if name in old]
            timed = [name for name in both if old[name].get("wall") and variants[name].get("wall")]
            base = floor_of(benchmark, timed, floor)
            for name in both:
                pair = old[name], variants[name]
                if floor is None and all(line.get("of_floor") for line in pair):
                    # Those of a floor itself are all 1.
                    if pair[0].get("floor", {}).keys() != {name}:
                        found.append((benchmark, case, name, pair[0]["of_floor"], pair[1]["of_floor"]))
                elif base is not None and name in timed and name != base:
                    ratios = [side[name]["wall"] / side[base]["wall"] for side in (old, variants)]
                    found.append((benchmark, case, name, ratios[0], ratios[1]))
    return found


def words(case: str) -> str:
    return ", ".join(f"{k} {v}" for k, v in json.loads(case).items() if v is not None)


def gone(before: Cases, after: Cases) -> list[str]:
    """What `after` lacks: benchmarks, cases of those it has, variants of those."""
    found = []
    for benchmark, cases in before.items():
        if benchmark not in after:
            found.append(f"{benchmark}, all {len(cases)} cases")
            continue
        for case, variants in cases.items():
            if case not in after[benchmark]:
                found.append(f"{benchmark}: {words(case)}")
            elif lost := [name for name in variants if name not in after[benchmark][case]]:
                found.append(f"{benchmark}: {words(case)}: {'; '.join(lost)}")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--floor", metavar="VARIANT")
    parser.add_argument("--slower", type=float, default=1.15)
    a = parser.parse_args(arguments)
    try:
        before, after = (gathered(lines.of_files([path])) for path in (a.before, a.after))
    except lines.Unusable as error:
        print(f"benchmarks compare: {error}", file=sys.stderr)
        return 2
    if not any(case in after.get(benchmark, {}) for benchmark, cases in before.items() for case in cases):
        print(f"benchmarks compare: {a.before} and {a.after} must have a case in common, got none", file=sys.stderr)
        return 2
    found = changes(before, after, a.floor)
    print("| benchmark | case | variant | before | after | after / before |\n" + "| --- " * 6 + "|")
    for benchmark, case, name, old, new in found:
        print(f"| {benchmark} | {words(case)} | {name} | {old:.2f} | {new:.2f} | {new / old:.2f} |")
    slower = [row for row in found if is_ours(row[0], row[2]) and not row[4] / row[3] <= a.slower]
    print(f"\n{len(found)} ratios, {len(slower)} of ours more than {a.slower:g} times what they were")
    for what in gone(before, after):
        print(f"missing in {a.after}: {what}")
    return 1 if slower else 0
