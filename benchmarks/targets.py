"""Targets as data, held against measurements: python -m benchmarks check [FILE ...]

Each [[target]] of targets.toml is one ratio:

    name, why       what a reader is told
    benchmark       the name in the result lines
    case            fields of the case, each one value or a list of them; every measured case that fits is held
    variant, over   sums of `metric` (wall, cpu, peak_mib ...) over these variants, whose ratio is the figure; without
                    `over` the first sum is
    metric          "wall" unless said
    at_most         or at_least: the bound

FILE holds result lines, one JSON object each, as `python -m benchmarks run` writes them; of a case that was measured
more than once the last counts. Without FILE: everything that is committed in benchmarks/results. Exit status 1 if a
figure misses its bound, 2 if a file has no results or a broken line. What was not measured says so and fails nothing.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import lines
from effkern.train.mapping import read_toml

PATH = Path(__file__).with_name("targets.toml")


@dataclass(frozen=True)
class Target:
    name: str
    why: str
    benchmark: str
    variant: tuple[str, ...]
    over: tuple[str, ...] = ()
    case: dict[str, Any] = field(default_factory=dict)
    metric: str = "wall"
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"targets: {self.name!r} must have one of at_most and at_least")

    def fits(self, case: dict[str, Any]) -> bool:
        return all(case.get(k) in (v if isinstance(v, list) else [v]) for k, v in self.case.items())

    def met(self, figure: float) -> bool:
        # NaN meets nothing.
        return figure <= self.at_most if self.at_most is not None else figure >= (self.at_least or 0.0)

    @property
    def bound(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"


@dataclass(frozen=True)
class Finding:
    target: Target
    case: dict[str, Any]
    figure: float | None
    """None: not measured."""

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        return "met" if self.target.met(self.figure) else "MISSED"


def read(path: Path = PATH) -> list[Target]:
    targets = []
    for row in read_toml(path)["target"]:
        for name in {"variant", "over"} & row.keys():
            row[name] = tuple(row[name]) if isinstance(row[name], list) else (row[name],)
        targets.append(Target(**row))
    return targets


Cases = dict[str, dict[str, dict[str, Any]]]
"""Per benchmark, per case as JSON: the line of each variant."""


def gathered(records: Iterable[lines.Record]) -> Cases:
    found: Cases = {}
    for record in records:
        case = json.dumps(lines.place(record), sort_keys=True)
        found.setdefault(record["benchmark"], {}).setdefault(case, {})[record["variant"]] = record
    return found


def read_lines(text: Iterable[str]) -> Cases:
    """Raises lines.Unusable: one of them is broken."""
    return gathered(lines.records_of(text))


def figure(target: Target, variants: dict[str, dict[str, Any]]) -> float | None:
    """None: a variant or its metric is not there, or both sums are 0, which says nothing."""
    values: dict[str, Any] = {
        name: variants.get(name, {}).get(target.metric) for name in (*target.variant, *target.over)
    }
    if not all(isinstance(value, int | float) for value in values.values()):
        return None
    top = float(sum(values[name] for name in target.variant))
    if not target.over:
        return top
    base = float(sum(values[name] for name in target.over))
    if base:
        return top / base
    return math.copysign(math.inf, top) if top else None


def findings(targets: Iterable[Target], cases: Cases) -> Iterator[Finding]:
    for target in targets:
        measured = False
        for text, variants in cases.get(target.benchmark, {}).items():
            case = json.loads(text)
            if target.fits(case) and (found := figure(target, variants)) is not None:
                measured = True
                yield Finding(target, case, found)
        if not measured:
            yield Finding(target, target.case, None)


def markdown(found: Iterable[Finding]) -> str:
    rows = ["| target | case | figure | bound | |", "| --- | --- | --- | --- | --- |"]
    for f in found:
        case = ", ".join(f"{k} {v}" for k, v in f.case.items() if v is not None)
        figure = "-" if f.figure is None else f"{f.figure:.2f}"
        rows.append(f"| {f.target.name} | {case} | {figure} | {f.target.bound} | {f.verdict} |")
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all of benchmarks/results")
    a = parser.parse_args(arguments)
    try:
        found = list(findings(read(), gathered(lines.given(a.files))))
    except lines.Unusable as error:
        print(f"benchmarks check: {error}", file=sys.stderr)
        return 2
    print(markdown(found))
    missed = [f for f in found if f.verdict == "MISSED"]
    unknown = sum(f.figure is None for f in found)
    print(f"\n{len(found) - len(missed) - unknown} met, {len(missed)} missed, {unknown} not measured")
    for name, why in dict.fromkeys((f.target.name, f.target.why) for f in missed):
        verdicts = [f.verdict for f in found if f.target.name == name]
        print(f"missed in {verdicts.count('MISSED')} of {len(verdicts)}: {name}: {why}")
    return 1 if missed else 0
