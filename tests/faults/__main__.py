"""`python -m tests.faults --trials 20`: every fault that many times; a table, and JSON with the numbers."""

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from tests.faults.bench import Bench, Found
from tests.faults.cases import CASES, run_case
from tests.faults.runs import small_config

COLUMNS = ("trials", "exact", "detected", "steps_repeated", "seconds")
STEPS = 240


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=20, help="of each case")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    parser.add_argument("--json", type=Path, help="write the numbers there; cases that are in it already stay")
    arguments = parser.parse_args()
    if arguments.trials < 1:
        parser.error(f"--trials must be at least 1, got {arguments.trials}")
    torch.set_num_threads(1)
    rows = json.loads(arguments.json.read_text())["cases"] if arguments.json and arguments.json.exists() else []
    print(f"{'case':24}" + "".join(f"{name:>16}" for name in COLUMNS))
    good = True
    for name in arguments.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), small_config(Path(folder), STEPS), arguments.seed)
            found = run_case(name, bench, arguments.trials)
        print(f"{name:24}" + "".join(f"{getattr(found, column):>16}" for column in COLUMNS), flush=True)
        good = good and _passed(found)
        rows = [row for row in rows if row["case"] != name] + [found.as_dict()]
        if arguments.json:
            arguments.json.write_text(json.dumps({**_setting(arguments.seed), "cases": rows}, indent=1) + "\n")
    return 0 if good else 1


def _passed(found: Found) -> bool:
    return found.exact == found.trials


def _setting(seed: int) -> dict[str, object]:
    return {
        "command": "python -m tests.faults", "seed": seed, "steps": STEPS,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU",
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
