"""This package's operators beside everybody else's, in turn in one run, each checked before it is timed.

    python -m benchmarks.peers                                   every family, its short cases
    python -m benchmarks.peers --op cross_entropy --full         one of them, all cases
    python -m benchmarks.peers --list                            who takes part here, and why others do not
    python -m benchmarks.peers --op distillation --device cuda --set rows=8192 dim=4096 vocab=128256 dtype=bfloat16

Packages that are not installed are left out, and the reason is printed; `pip install --no-deps -r
benchmarks/peers/requirements.txt` installs all there are without touching torch. A peer with a wrong result is left
out, too; a wrong result of this package ends the run.
"""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch

from benchmarks.harness import missing
from benchmarks.peers.peer import Family, measure
from benchmarks.suite import refusal, write
from effkern.ops.distill.rows import DIVERGENCES

FAMILIES = ("cross_entropy", "distillation", "add_norm", "matrix_optimizers", "lora_optimizers")


def family_of(name: str) -> Family:
    return import_module(f"benchmarks.peers.{name}").FAMILY


def override(case: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The case with NAME=VALUE settings, in the types that it has. Names it does not have belong to other families.

    Raises:
        ValueError: a value that no case of this kind can have.
    """
    found = dict(case)
    for setting in settings:
        name, _, value = setting.partition("=")
        if name in found:
            found[name] = type(found[name])(value)
            if isinstance(found[name], int) and found[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
    return found


def overridden(family: Family, quick: bool, settings: list[str]) -> list[dict[str, Any]]:
    """The family's cases with the settings.

    Raises:
        ValueError: one of them cannot be.
    """
    found = distinct([override(case, settings) for case in family.cases(quick)])
    # Words: those of any case, or what its parts know.
    known = {"dtype": set(family.bounds), "divergence": set(DIVERGENCES)}
    for case in family.cases(False):
        for name, value in case.items():
            if isinstance(value, str):
                known.setdefault(name, set()).add(value)
    for case in found:
        for name, value in case.items():
            if isinstance(value, str) and value not in known[name]:
                raise ValueError(
                    f"{name} of {family.name} must be one of {', '.join(sorted(known[name]))}, got {value}"
                )
    return found


def distinct(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings may have made two of them one."""
    return list({json.dumps(case, sort_keys=True): case for case in cases}.values())


def result_lines(family: Family, case: dict[str, Any], device: str, rounds: int) -> tuple[list[str], str]:
    """One JSON object per peer, and a table. The first line has whom the run left out, and why."""
    timings, extra, left_out = measure(family, case, device, rounds)
    if left_out:
        extra[next(iter(timings))]["left_out"] = left_out
    name = {"op": family.name, **case, "device": device}
    ours = next(n for n in timings if n.startswith("effkern"))
    text = f"{family.name}: {json.dumps(case)}\n{runner.table(timings, ours, extra)}"
    return runner.result_lines("peers", name, timings, extra), text.replace("x floor", "x ours ")


def listing(device: str) -> str:
    lines = []
    for name in FAMILIES:
        family = family_of(name)
        lines.append(f"{name}: {family.about}")
        for peer in family.peers:
            missing = peer.missing(device)
            lines.append(f"  {peer.name:<38}{f'no: {missing}' if missing else 'yes'}")
            if peer.differs:
                lines.append(f"  {'':<38}differs: {peer.differs}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--full", action="store_true", help="all cases of each family")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other sizes of the cases")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="who takes part on this machine; nothing is timed")
    parser.add_argument(
        "--json", nargs="?", const="-", default="", metavar="FILE", help="JSON lines on standard output, or in FILE"
    )
    a = parser.parse_args(arguments)
    if bad := [setting for setting in a.set if "=" not in setting]:
        parser.error(f"--set must have NAME=VALUE, got {bad[0]!r}")
    families = [family_of(name) for name in a.op]
    names = {name for family in families for case in family.cases(not a.full) for name in case}
    if unknown := [setting for setting in a.set if setting.partition("=")[0] not in names]:
        parser.error(f"--set must name one of {', '.join(sorted(names))}, got {unknown[0]!r}")
    if reason := missing(a.device):
        parser.error(reason)
    if a.rounds < 1 or a.threads < 1:
        parser.error(f"--rounds and --threads must be at least 1, got {a.rounds} and {a.threads}")
    torch.set_num_threads(a.threads)
    if a.list:
        print(listing(a.device))
        return 0
    try:
        chosen = [(family, overridden(family, not a.full, a.set)) for family in families]
    except ValueError as error:
        parser.error(f"--set: {error}")
    if a.json not in ("", "-") and (why := refusal(Path(a.json))):
        parser.error(f"--json must be a file that can be written, got {a.json}: {why}")
    runner.keep_memory()
    lines: list[str] = []
    for family, cases in chosen:
        for case in cases:
            found, text = result_lines(family, case, a.device, a.rounds)
            lines += found
            print("\n".join(found) if a.json == "-" else text, flush=True)
            if a.json not in ("", "-"):
                write(Path(a.json), lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
