"""`effkern demo`: a small teacher, then one student without it and one with it, on the same tokens.

The folder holds data/, teacher/, baseline/, salt/ (run directories), demo.json (what is being done), and at the end
report.json, report.md and curves.png. An interrupted demo goes on where it stopped; a finished one trains again.
"""

import json
import platform
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from effkern.data import PackedDataset, build_dataset
from effkern.train.config import TrainConfig
from effkern.train.demo_plan import DemoPlan
from effkern.train.loop import TrainResult, train
from effkern.train.presets import PRESETS
from effkern.train.report import write_report

ARMS = ("teacher", "baseline", "salt")
REPORTS = ("report.json", "report.md", "curves.png")


class DemoInterrupted(RuntimeError):
    """A signal ended the demo; `signum` is its number."""

    def __init__(self, signum: int, out: Path) -> None:
        super().__init__(f"interrupted; what was trained is saved. Run the same command again to go on in {out}")
        self.signum = signum


def default_plan(out: Path, seed: int) -> DemoPlan:
    """The presets demo and demo-teacher, placed under `out`, with `seed` for weights and order."""
    plan = DemoPlan(teacher=PRESETS["demo-teacher"].config, student=PRESETS["demo"].config)
    return place(plan, out, seed)


def place(plan: DemoPlan, out: Path, seed: int) -> DemoPlan:
    """`plan` with its folders under `out` and its seeds made of `seed`."""

    def under(config: TrainConfig, name: str) -> TrainConfig:
        data = replace(config.data, path=str(out / "data"), seed=seed)
        return replace(config, data=data, run=replace(config.run, out=str(out / name), seed=seed))

    student = under(plan.student, "salt")
    student = replace(student, teacher=replace(student.teacher, checkpoint=str(out / "teacher")))
    return replace(plan, teacher=under(plan.teacher, "teacher"), student=student)


def arms(plan: DemoPlan) -> dict[str, TrainConfig]:
    """The three runs. Both students have the same weights at the start and the same batches."""
    schedule = replace(plan.student.schedule, mode="baseline", kd_steps=0)
    run = replace(plan.student.run, out=str(Path(plan.student.run.out).with_name("baseline")))
    baseline = replace(plan.student, schedule=schedule, run=run)
    return {"teacher": plan.teacher, "baseline": baseline, "salt": plan.student}


def _request(plan: DemoPlan) -> dict[str, Any]:
    """What the packed dataset must have been made from to be used again."""
    return {
        "sources": list(plan.sources),
        "vocab_size": plan.vocab_size,
        "max_bytes": plan.max_bytes,
        "python": platform.python_version(),
    }


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _dataset(plan: DemoPlan, out: Path, state: dict[str, Any], quiet: bool) -> PackedDataset:
    """The packed corpus: the one that is there if it was made from the same request, else a new one."""
    folder = out / "data"
    if state.get("data") == _request(plan):
        try:
            dataset = PackedDataset(folder)
        except (OSError, ValueError):
            pass
        else:
            if dataset.hash == state.get("data_hash"):
                return dataset
    if not quiet:
        print(f"building the corpus from {', '.join(plan.sources)} in {folder}", flush=True)
    return build_dataset(folder, plan.sources, vocab_size=plan.vocab_size, max_bytes=plan.max_bytes, overwrite=True)


def run_demo(
    out: str | Path = "runs/demo", *, seed: int = 0, plan: DemoPlan | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Train the three models, compare them, write the report; returns what report.json holds.

    Args:
        out: folder of the demo; it holds nothing else.
        seed: of weights and data order.
        plan: other sizes (tests); it is placed under `out`.

    Raises:
        DemoInterrupted: SIGINT or SIGTERM; the same call goes on.
        ValueError: `out` holds files that are not a demo's.
    """
    out, start = Path(out), time.monotonic()
    marker = out / "demo.json"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise ValueError(f"demo: out must be new or hold an earlier demo, got {out}")
    plan = default_plan(out, seed) if plan is None else place(plan, out, seed)
    state = _read_state(marker)
    runs = arms(plan)
    work = json.loads(json.dumps({name: asdict(config) for name, config in runs.items()}))
    out.mkdir(parents=True, exist_ok=True)
    if not marker.exists():
        marker.write_text(json.dumps({"status": "new"}))
    dataset = _dataset(plan, out, state, quiet)
    begun = {"status": "running", "work": work, "data": _request(plan), "data_hash": dataset.hash}
    if state != begun:
        _clear(out)
    marker.write_text(json.dumps(begun))
    data_seconds = time.monotonic() - start
    results = _train_all(runs, quiet)
    report = write_report(out, plan, runs, results, dataset, data_seconds=data_seconds, start=start)
    marker.write_text(json.dumps({**begun, "status": "done"}))
    return report


def _clear(out: Path) -> None:
    """Remove what an earlier demo trained and reported; the corpus stays."""
    for name in ARMS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in REPORTS:
        (out / name).unlink(missing_ok=True)


def _train_all(runs: dict[str, TrainConfig], quiet: bool) -> dict[str, TrainResult]:
    results: dict[str, TrainResult] = {}
    for name, config in runs.items():
        result = train(config, title=name, quiet=quiet)
        if result.signum is not None:
            raise DemoInterrupted(result.signum, Path(config.run.out).parent)
        results[name] = result
    return results
