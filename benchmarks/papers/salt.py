"""SALT in miniature: does a small teacher help a larger student, in which stage, and on which tokens?

    python -m benchmarks.papers.salt [--steps 400] [--seeds 3] [--out FILE.json]

The demo's corpus and models: the teacher has about a third of the student's parameters and as many steps. Every arm
trains the same student, with the same initial weights and, where nothing is selected, the same batches:

    baseline      no teacher                        (arXiv 2410.18779 names these arms)
    rkd           omega throughout
    salt          omega in stage 1, then 0
    salt-linear   omega falls in a line through the second half of stage 1
    salt-ds       salt; stage 1 draws from the windows that an early teacher finds challenging yet learnable

Stage 1 is --stage-one of the steps. Quoted are mean and standard deviation over seeds of weights, order and teacher of
the validation loss and accuracy at 70% and 100% of the steps, and of the difference to the baseline with the same seed.
Then, by bucket of the teacher's confidence (its entropy; equal numbers of tokens): losses, and the calibration gap,
mean probability of the label less the share of labels that are the likeliest token. Runs are kept under --work: an
interrupted command goes on. Seconds are only as good as the machine was quiet. A model of this size shows signs, not
sizes.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import numpy as np
from numpy.typing import NDArray

from effkern.data import PackedDataset, build_dataset, val_batches
from effkern.data.curation import steps as curation
from effkern.data.curation.artifact import Artifact, open_artifact
from effkern.data.curation.pool import Pool
from effkern.models import count_parameters
from effkern.train.checkpoint import list_checkpoints
from effkern.train.compare import confidence_buckets, token_losses
from effkern.train.config import ScheduleConfig, TeacherConfig, TrainConfig
from effkern.train.device import choose_precision
from effkern.train.loop import TrainResult, train
from effkern.train.presets import PRESETS
from effkern.train.restore import load_model

ARMS = ("baseline", "rkd", "salt", "salt-linear", "salt-ds")
BUCKETS = 5


def place(config: TrainConfig, out: Path, seed: int, a: argparse.Namespace, **run: Any) -> TrainConfig:
    every = max(1, a.steps // 10)
    settings = replace(
        config.run, out=str(out), seed=seed, threads=a.threads, tensorboard=False, plot=False, eval_every=every,
        eval_tokens=a.eval_tokens, checkpoint_every=every, **run,
    )  # fmt: skip
    return replace(config, run=settings, data=replace(config.data, path=str(a.work / "data"), seed=seed))


def finished(config: TrainConfig, title: str) -> TrainResult:
    result = train(config, title=title)
    if result.signum is not None:
        raise SystemExit(128 + result.signum)
    return result


def teacher_of(seed: int, a: argparse.Namespace) -> tuple[TrainResult, Path]:
    """The trained teacher, and its checkpoint after a fifth of the steps."""
    base = PRESETS["demo-teacher"].config
    config = replace(base, schedule=ScheduleConfig(steps=a.steps))
    result = finished(place(config, a.work / f"teacher-{seed}", seed, a, keep_last=99), f"teacher, seed {seed}")
    return result, list_checkpoints(result.out / "checkpoints")[1]


def selection_of(seed: int, early: Path, a: argparse.Namespace) -> Artifact:
    """The windows of stage 1 by SALT_DS score: as many as it reads, so that none comes twice."""
    out = a.work / f"selection-{seed}"
    if (out / "curation.json").exists():
        return open_artifact(out, "selection")
    student = PRESETS["demo"].config
    loaded = load_model(early, "cpu")
    pool = Pool([a.work / "data"], student.data.seq_len)
    scores = curation.score(loaded.model, loaded.weights_hash, pool, a.work / f"scores-{seed}", overwrite=True)
    budget = min(len(pool), a.stage * student.data.batch_size)
    return curation.select(scores, out, method="salt-ds", budget=budget, overwrite=True)


def arm_config(arm: str, seed: int, teacher: TrainResult, early: Path, a: argparse.Namespace) -> TrainConfig:
    config = place(PRESETS["demo"].config, a.work / f"{arm}-{seed}", seed, a)
    if arm == "baseline":
        return replace(config, schedule=ScheduleConfig(steps=a.steps), teacher=TeacherConfig())
    source = TeacherConfig(checkpoint=str(teacher.out), temperature=a.temperature)
    if arm == "rkd":
        schedule = ScheduleConfig(steps=a.steps, mode="rkd", omega=a.omega)
    else:
        schedule = ScheduleConfig(steps=a.steps, mode="salt", omega=a.omega, kd_steps=a.stage)
    if arm == "salt-linear":
        schedule = replace(schedule, transition="linear", decay_start=a.stage // 2)
    if arm == "salt-ds":
        chosen = selection_of(seed, early, a)
        config = replace(config, data=replace(config.data, selection=str(chosen.path)))
    return replace(config, schedule=schedule, teacher=source)


def record_of(arm: str, seed: int, result: TrainResult) -> dict[str, Any]:
    evals = {e["step"]: {"loss": e["loss"], "accuracy": e["accuracy"]} for e in result.evals}
    steps = max(evals)
    most = min(evals, key=lambda step: abs(step - 0.7 * steps))
    state = result.state
    return {
        "arm": arm, "seed": seed, "steps": steps, "70%": {"step": most, **evals[most]}, "100%": evals[steps],
        "evals": {str(step): found["loss"] for step, found in evals.items()}, "wall_s": round(state.wall_s, 2),
        "cpu_s": round(state.cpu_s, 2), "teacher_share": round(result.teacher_share, 4),
    }  # fmt: skip


def buckets_of(runs: dict[str, Path], a: argparse.Namespace) -> list[dict[str, Any]]:
    """Per bucket of the teacher's entropy, surest first: loss and calibration gap of every model."""
    data, length = PackedDataset(a.work / "data"), PRESETS["demo"].config.data.seq_len
    losses: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, path in runs.items():
        loaded = load_model(path, "cpu")
        dtype = choose_precision("auto", next(loaded.model.parameters()).device)
        losses[name] = token_losses(loaded.model, val_batches(data, length, 16, a.eval_tokens), dtype)
    gaps = {
        name: {**found, "ce": np.exp(-found["ce"]) - found["hit"]} for name, found in losses.items()
    }  # the same means over the same buckets
    rows = []
    for loss, gap in zip(confidence_buckets(losses, BUCKETS), confidence_buckets(gaps, BUCKETS)):
        rows.append(
            {
                "teacher_entropy": loss["teacher_entropy"],
                "loss": {name: loss[name] for name in runs},
                "calibration_gap": {name: gap[name] for name in runs},
            }
        )
    return rows


def spread(values: Sequence[float], digits: int = 3) -> str:
    error = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} +- {error:.{digits}f}"


def table(records: list[dict[str, Any]]) -> str:
    head = "| arm | loss at 70% | loss at 100% | less the baseline's | accuracy at 100% | wall s | CPU s | teacher |"
    lines = [head, "|---" * 8 + "|"]
    base = {r["seed"]: r["100%"]["loss"] for r in records if r["arm"] == "baseline"}
    for arm in dict.fromkeys(r["arm"] for r in records):
        rows = [r for r in records if r["arm"] == arm]
        differences = [r["100%"]["loss"] - base[r["seed"]] for r in rows if r["seed"] in base]
        lines.append(
            f"| {arm} | {spread([r['70%']['loss'] for r in rows])} | {spread([r['100%']['loss'] for r in rows])} | "
            f"{spread(differences, 4)} | {spread([r['100%']['accuracy'] for r in rows])} | "
            f"{statistics.mean(r['wall_s'] for r in rows):.0f} | {statistics.mean(r['cpu_s'] for r in rows):.0f} | "
            f"{statistics.mean(r['teacher_share'] for r in rows):.3f} |"
        )
    return "\n".join(lines)


def bucket_table(found: list[list[dict[str, Any]]]) -> str:
    """Means over seeds."""
    names = list(found[0][0]["loss"])
    lines = ["| teacher's entropy | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for rows in zip(*found):
        cells = [
            f"{statistics.mean(r['loss'][n] for r in rows):.3f} "
            f"({statistics.mean(r['calibration_gap'][n] for r in rows):+.3f})"
            for n in names
        ]
        lines.append(f"| {statistics.mean(r['teacher_entropy'] for r in rows):.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--stage-one", type=float, default=0.3, help="share of the steps with a teacher")
    parser.add_argument("--omega", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the teacher")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/salt"), help="corpus and runs")
    parser.add_argument("--out", type=Path, help="write records and machine as JSON")
    a = parser.parse_args()
    a.stage = max(2, round(a.stage_one * a.steps))
    if not (a.work / "data").exists():
        build_dataset(a.work / "data", ["stdlib"], vocab_size=PRESETS["demo"].config.model.vocab_size)
    models = {name: count_parameters(PRESETS[preset].config.model) for name, preset in
              (("teacher", "demo-teacher"), ("student", "demo"))}  # fmt: skip
    print(json.dumps({"parameters": models, "stage_one_steps": a.stage, **runner.machine()}), flush=True)
    records, buckets = [], []
    for seed in range(a.seeds):
        teacher, early = teacher_of(seed, a)
        records.append(record_of("teacher", seed, teacher))
        runs = {"teacher": teacher.out}
        for arm in a.arms:
            result = finished(arm_config(arm, seed, teacher, early, a), f"{arm}, seed {seed}")
            records.append(record_of(arm, seed, result))
            runs[arm] = result.out
            print(json.dumps({k: v for k, v in records[-1].items() if k != "evals"}), flush=True)
        buckets.append(buckets_of(runs, a))
        if a.out:
            case = {k: v for k, v in vars(a).items() if k not in ("work", "out")}
            case |= {"parameters": models, **runner.machine()}
            temporary = a.out.with_name(f".{a.out.name}.tmp")
            temporary.write_text(json.dumps({**case, "records": records, "buckets": buckets}, indent=1) + "\n")
            temporary.replace(a.out)
    print(table(records))
    print("\nLoss (calibration gap), by the teacher's entropy, means over seeds:\n")
    print(bucket_table(buckets))


if __name__ == "__main__":
    main()
