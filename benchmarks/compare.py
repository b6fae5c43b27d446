"""Two measurements of the same cases: python -m benchmarks compare BEFORE AFTER [--floor VARIANT] [--slower 1.15]

Compares ratios, not times, because machines and their load differ: each variant's wall time over its floor's where both
files say it (of_floor, the median over rounds), else over that of a variant both have in the same case (by default the
first that is not ours). Exit status 1 if the ratio of one of ours grew by more than `--slower`.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.targets import Cases, read_lines


def floor_of(names: list[str], floor: str | None) -> str | None:
    if floor is not None:
        return floor if floor in names else None
    return next((name for name in names if not is_ours(name)), None)


def is_ours(name: str) -> bool:
    return name.startswith(("effkern", "ours")) or name in ("LoRA-RITE", "auto")


def changes(before: Cases, after: Cases, floor: str | None) -> list[tuple[str, str, str, float, float]]:
    """Benchmark, case, variant, and its ratio to the floor before and after, of all that both have."""
    found = []
    for benchmark, cases in after.items():
        for case, variants in cases.items():
            old = before.get(benchmark, {}).get(case, {})
            both = [name for name in variants if name in old]
            base = floor_of(both, floor)
            for name in both:
                lines = old[name], variants[name]
                if floor is None and all("of_floor" in line for line in lines):
                    # Those of a floor itself are all 1.
                    if lines[0].get("floor", {}).keys() != {name}:
                        found.append((benchmark, case, name, lines[0]["of_floor"], lines[1]["of_floor"]))
                elif base is not None and name != base:
                    ratios = [side[name]["wall"] / side[base]["wall"] for side in (old, variants)]
                    found.append((benchmark, case, name, ratios[0], ratios[1]))
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
        before, after = (read_lines(path.read_text().splitlines()) for path in (a.before, a.after))
    except OSError as error:
        print(f"benchmarks compare: cannot read {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    found = changes(before, after, a.floor)
    print("| benchmark | case | variant | before | after | after / before |\n" + "| --- " * 6 + "|")
    for benchmark, case, name, old, new in found:
        text = ", ".join(f"{k} {v}" for k, v in json.loads(case).items() if v is not None)
        print(f"| {benchmark} | {text} | {name} | {old:.2f} | {new:.2f} | {new / old:.2f} |")
    slower = [row for row in found if is_ours(row[2]) and not row[4] / row[3] <= a.slower]
    print(f"\n{len(found)} ratios, {len(slower)} of ours more than {a.slower:g} times what they were")
    return 1 if slower else 0
