"""`python -m tests.faults.soak --minutes 60`: demo-size training for that long; memory must stay constant within 2%.

Minutes are those of the process's own CPU time, on one thread: what else the machine does shortens nothing.

The demo's student with its checkpoints, validation, log and TensorBoard, on a corpus of made-up sentences. Resident
memory is read after every step. It goes up and down within a step, by what the allocator gives back; what counts is its
level, the median of each tenth of the run, after the first, in which allocator and caches fill. The lowest and the
highest single reading are printed beside it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch

from effkern.train.config import ScheduleConfig, TeacherConfig
from effkern.train.loop import Trainer
from effkern.train.presets import PRESETS
from tests.faults.runs import changed, small_config

LIMIT = 0.02
PARTS = 10


def soak(minutes: float, folder: Path) -> dict[str, Any]:
    """Steps, and the level of resident memory in MiB over the parts of the run."""
    data = small_config(folder, 1).data.path
    config = replace(PRESETS["demo"].config, teacher=TeacherConfig(), schedule=ScheduleConfig(steps=10**6))
    config = changed(config, data__path=data, run__out=str(folder / "run"), run__device="cpu", run__precision="fp32")
    trainer = Trainer(config, quiet=True)
    process, start, held = psutil.Process(), time.process_time(), []
    real = trainer.parallel.stop

    def stop(signum: int | None) -> int | None:
        now = time.process_time() - start
        held.append((now, process.memory_info().rss / 2**20))
        return 15 if now > 60 * minutes else real(signum)

    trainer.parallel.stop = stop  # type: ignore[method-assign]
    result = trainer.run()
    length = 60 * minutes / PARTS
    parts = [[size for now, size in held if i * length <= now < (i + 1) * length] for i in range(PARTS)]
    levels = [round(statistics.median(part), 1) for part in parts]
    return {
        "minutes": round((time.process_time() - start) / 60, 2),
        "steps": result.state.step,
        "checkpoints": result.state.step // config.run.checkpoint_every,
        "validations": result.state.step // config.run.eval_every,
        "levels_mib": levels,
        "spread": round(max(levels[1:]) / min(levels[1:]) - 1, 4),
        # Single readings, also within the first part.
        "lowest_mib": round(min(size for _, size in held), 1),
        "highest_mib": round(max(size for _, size in held), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(arguments.minutes, Path(folder))
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["spread"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
