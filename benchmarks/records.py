"""Committed results of other commands as result lines, which `check` can hold: python -m benchmarks.records [--json]

Every line has benchmark = "records", and the file it comes from as case["of"]. Figures that a target compares are
fields: `of_formula`, `growth`, `gap_over_deviation` ... Files that are not there give no lines, and their targets stay
"not measured"; demo.json is a copy of the report.json that `effkern demo` writes.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.lines import RESULTS, Unusable

MACHINE = ("date", "processor", "cores", "threads", "load", "gpu", "torch", "effkern", "python")
Found = Iterator[tuple[dict[str, Any], str, dict[str, Any]]]
"""Case, variant, fields."""


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def distill_catalogue(path: Path) -> Found:
    """`wall` and `cpu` are multiples of the bare products' times."""
    for row in json.loads(path.read_text())["rows"]:
        case = {key: value for key, value in row.items() if not isinstance(value, dict) and key != "floor_ms"}
        for variant, fields in row.items():
            if isinstance(fields, dict):
                yield case, variant, fields


def laurel_memory(path: Path) -> Found:
    """`over_plain_mib`: beyond a plain residual and the N r numbers that one with a low-rank map may keep."""
    peaks = {json.dumps(r["case"]): r["peak_mib"] for r in lines_of(path) if r["variant"] == "add+norm"}
    for r in lines_of(path):
        if "peak_mib" in r:
            size = 4 if r["case"]["dtype"] == "float32" else 2
            kept = peaks[json.dumps(r["case"])] + r["case"]["rows"] * r["case"]["rank"] * size / 2**20
            yield r["case"], r["variant"], {"peak_mib": r["peak_mib"], "of_plain": r["peak_mib"] / kept}


def looped_memory(path: Path) -> Found:
    """`of_formula` of each mode's peak; `growth` of a shared gradient's error from 4 to 32 loops."""
    records = json.loads(path.read_text())["records"]
    for r in records:
        if r["part"] == "memory":
            case = {"part": "memory", "layers": r["layers"], "loops": r["loops"], "mode": r["mode"]}
            yield case, "effkern", {"of_formula": r["states"] / r["formula"]}
    errors = {(r["variant"], r["loops"]): r["error"] for r in records if r["part"] == "gradient"}
    for variant in dict.fromkeys(name for name, _ in errors):
        yield {"part": "gradient"}, variant, {"growth": errors[variant, 32] / errors[variant, 4]}


def looped_time(path: Path) -> Found:
    for r in json.loads(path.read_text())["records"]:
        case = {key: r[key] for key in ("part", "layers", "loops")}
        yield case, r["variant"], {key: r[key] for key in ("wall", "cpu", "wall_low")}


def invariance(path: Path) -> Found:
    """`over_floor` after 20 steps; state in sizes of the parameters."""
    for r in lines_of(path):
        if r["benchmark"] == "lora_rite_invariance":
            yield {"part": "invariance", **r["case"], "steps": 20}, "effkern", {"over_floor": r["ours_over_floor"][1]}
        else:
            yield {"part": "state", **r["case"]}, r["variant"], {"state_over_parameters": r["state_x_parameters"]}


def sampled_kd(path: Path) -> Found:
    """`gap_over_deviation`: mean loss beyond the live teacher's, over the deviation of that between seeds."""
    records = json.loads(path.read_text())["records"]
    full = {r["seed"]: r for r in records if r["arm"] == "full"}
    deviation = statistics.stdev(r["loss"] for r in full.values())
    for arm in dict.fromkeys(r["arm"] for r in records):
        rows = [r for r in records if r["arm"] == arm]
        gap = statistics.mean(r["loss"] - full[r["seed"]]["loss"] for r in rows)
        share = statistics.mean(r["bytes"] / full[r["seed"]]["bytes"] for r in rows)
        yield {"seeds": len(rows)}, arm, {"gap_over_deviation": gap / deviation, "bytes_share": share}


def shampoo_regression(path: Path) -> Found:
    """`win`: the next best value over one-sided's, which may be exactly 0."""
    given = json.loads(path.read_text())
    for accumulation in ("sum", "ema"):
        chosen = [r for r in given["records"] if (r["H"], r["accumulation"]) == ("rotated", accumulation)]
        values = {r["method"]: r["value"] for r in chosen}
        ours = values["one-sided, left, effkern.optim.Shampoo"]
        others = min(v for name, v in values.items() if not name.startswith("one-sided, left"))
        case = {"dim": given["dim"], "H": "rotated", "accumulation": accumulation}
        yield case, "one-sided", {"win": others / max(ours, 1e-30)}


def shampoo_precision(path: Path) -> Found:
    for r in lines_of(path):
        if not r["warm"]:
            for method, error in r["errors"].items():
                yield {"n": r["n"], "spectrum": r["spectrum"], "ridge": r["ridge"]}, method, {"error": error}


def demo(path: Path) -> Found:
    """The report.json of `effkern demo`."""
    yield {}, "effkern demo", {"minutes": json.loads(path.read_text())["timing"]["total_s"] / 60}


READERS: dict[str, tuple[str, Callable[[Path], Found]]] = {
    "distill_catalogue_intel_float32.json": ("distill_catalogue", distill_catalogue),
    "distill_catalogue_intel_bfloat16.json": ("distill_catalogue", distill_catalogue),
    "distill_catalogue_intel_hidden.json": ("distill_catalogue", distill_catalogue),
    "distill_catalogue_intel_memory.json": ("distill_memory", distill_catalogue),
    "laurel_memory.jsonl": ("laurel_memory", laurel_memory),
    "looped_modes_memory.json": ("looped_modes", looped_memory),
    "looped_modes_time.json": ("looped_modes", looped_time),
    "lora_rite_invariance.jsonl": ("lora_rite", invariance),
    "sampled_kd.json": ("sampled_kd", sampled_kd),
    "shampoo_precision.jsonl": ("shampoo_precision", shampoo_precision),
    "shampoo_regression_96.json": ("shampoo_regression", shampoo_regression),
    "shampoo_regression_192.json": ("shampoo_regression", shampoo_regression),
    "demo.json": ("demo", demo),
}


def machine_of(path: Path) -> dict[str, Any]:
    """What the file says about where it was measured."""
    given = lines_of(path)[-1] if path.suffix == ".jsonl" else json.loads(path.read_text())
    # The demo's report.
    named = given.get("timing", {}).get("machine")
    given = given.get("machine", given.get("versions", given))
    found = {key: given[key] for key in MACHINE if key in given}
    # Files from before the field had its present name.
    if isinstance(given.get("cpu"), str):
        found.setdefault("processor", given["cpu"])
    return {**found, "processor": named} if named else found


def lines(folder: Path = RESULTS) -> list[str]:
    """All result lines that the files of `folder` hold.

    Raises:
        Unusable: one of them is not what its command writes.
    """
    found = []
    for file in READERS:
        path = folder / file
        if path.exists():
            try:
                found += lines_from(path)
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
                raise Unusable(f"cannot read {path}: {type(error).__name__}: {error}") from None
    return found


def lines_from(path: Path) -> list[str]:
    (of, read), machine, found = READERS[path.name], machine_of(path), []
    for case, variant, fields in read(path):
        case = {"of": of, **{key: value for key, value in case.items() if key != "device"}, "device": "cpu"}
        record = {"benchmark": "records", "case": case, "variant": variant, **fields, **machine, "file": path.name}
        found.append(json.dumps(record))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks records", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument(
        "--json", nargs="?", const="-", default="", metavar="FILE", help="JSON lines on standard output, or in FILE"
    )
    a = parser.parse_args(arguments)
    try:
        found = lines(a.folder)
    except Unusable as error:
        print(f"benchmarks records: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"benchmarks records: {a.folder} must hold one of {', '.join(READERS)}, got none", file=sys.stderr)
        return 2
    if a.json in ("", "-"):
        print("\n".join(found) if a.json else f"{len(found)} lines; --json prints them")
        return 0
    path = Path(a.json)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in found))
    os.replace(temporary, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
