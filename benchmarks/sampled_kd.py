"""Distillation from a soft-label cache against the live teacher, on the demo's corpus and models.

    python -m benchmarks.sampled_kd [--seeds 3] [--steps 300] [--width 256] [--draws 50 500] [--out FILE.json]

One teacher; every arm trains the demo's student with the same batches and initial weights, on the teacher alone
(omega 1, all steps), so that nothing but the target differs. The top-k arm stores as many entries a token as the first
sampled one does on average, the stratified arm half as many as head and half as draws. "no teacher" is plain training.
--width narrows the student (its feed-forward layer is 4 times as wide); the teacher has 128.
Quoted is the final validation loss; mean and standard deviation are over seeds of weights, order and draws.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

from effkern.data import build_dataset
from effkern.data.dataset import PackedDataset
from effkern.train.config import ScheduleConfig, TeacherConfig, TrainConfig
from effkern.train.loop import train
from effkern.train.presets import PRESETS
from effkern.train.soft_labels import LabelOptions, SoftLabelJob

VOCAB = 4096
# A full distribution of the teacher in float16.
FULL_BYTES = 2 * VOCAB


def prepare(work: Path, threads: int) -> Path:
    """Corpus and teacher, once; returns the teacher's run directory."""
    data = work / "data"
    try:
        PackedDataset(data)
    except FileNotFoundError:
        build_dataset(data, ["stdlib"], vocab_size=VOCAB)
    teacher = PRESETS["demo-teacher"].config
    train(place(teacher, data, work / "teacher", 0, threads), title="teacher")
    return work / "teacher"


def place(config: TrainConfig, data: Path, out: Path, seed: int, threads: int) -> TrainConfig:
    run = replace(
        config.run, out=str(out), seed=seed, threads=threads, tensorboard=False, plot=False, eval_every=0,
        eval_tokens=16384,
    )  # fmt: skip
    return replace(config, run=run, data=replace(config.data, path=str(data), seed=seed))


def student(width: int) -> TrainConfig:
    """The demo's student, or one of another width."""
    base = PRESETS["demo"].config
    return replace(base, model=replace(base.model, hidden_size=width, mlp_size=4 * width))


def cache(work: Path, teacher: Path, name: str, seed: int, steps: int, **options: Any) -> tuple[Path, float]:
    """A cache for the first `steps` of seed's order, and its bytes a token."""
    out = work / f"labels-{name}-{seed}"
    batch = PRESETS["demo"].config.data.batch_size
    fixed: dict[str, Any] = {"steps": steps, "batch_size": batch, "order_seed": seed, "seed": seed}
    manifest = SoftLabelJob(teacher, work / "data", replace(LabelOptions(), **fixed, **options)).write(out).manifest
    assert manifest is not None
    return out, manifest.bytes / manifest.spec.num_tokens


Arm = tuple[str, str, TeacherConfig, float]


def arms(work: Path, teacher: Path, seed: int, a: argparse.Namespace) -> Iterator[Arm]:
    """(key, name, teacher, teacher bytes a token) of the arms that are asked for; no teacher has an empty config."""
    last = {"topk", "stratified"}
    wanted = set(a.only) or {"none", "full", "topk", *(f"sampled{draws}" for draws in a.draws)}
    wanted |= {"stratified"} if a.stratified else set()
    if "none" in wanted:
        yield "none", "no teacher", TeacherConfig(), 0.0
    if "full" in wanted:
        yield "full", "full, live teacher", TeacherConfig(checkpoint=str(teacher)), FULL_BYTES
    sizes = []
    for draws in a.draws:
        # Of what comes last, the size is that of the first cache.
        if f"sampled{draws}" not in wanted and not wanted & last:
            continue
        path, size = cache(work, teacher, f"sampled{draws}", seed, a.steps, draws=draws)
        sizes.append(size)
        if f"sampled{draws}" in wanted:
            yield f"sampled{draws}", f"sampled {draws}", TeacherConfig(cache=str(path)), size
    if not wanted & last:
        return
    # 5 bytes a token stand beside the entries, and the entry has 3 bytes in all these forms at this vocabulary.
    k = max(2, round((sizes[0] - 5) / 3))
    path, size = cache(work, teacher, "topk", seed, a.steps, method="topk", k=k)
    if "topk" in wanted:
        yield "topk", f"top-{k} truncated", TeacherConfig(cache=str(path), cache_kind="truncated"), size
    if "stratified" in wanted:
        head, draws = k // 2, k - k // 2
        path, size = cache(work, teacher, "stratified", seed, a.steps, method="stratified", k=head, draws=draws)
        yield "stratified", f"stratified {head} + {draws}", TeacherConfig(cache=str(path)), size


def run(a: argparse.Namespace) -> list[dict[str, Any]]:
    work, steps, threads = a.work, a.steps, a.threads
    teacher = prepare(work, threads)
    base = student(a.width)
    records = []
    for seed in range(a.seeds):
        for key, name, source, size in arms(work, teacher, seed, a):
            mode = "rkd" if source.checkpoint or source.cache else "baseline"
            config = place(base, work / "data", work / f"run-{key}-{seed}", seed, threads)
            schedule = ScheduleConfig(steps=steps, mode=mode, omega=1.0)  # type: ignore[arg-type]
            result = train(replace(config, schedule=schedule, teacher=source), title=f"{name}, seed {seed}")
            if result.signum is not None:
                raise SystemExit(128 + result.signum)
            last = result.evals[-1]
            records.append(
                {
                    "arm": key, "name": name, "seed": seed, "loss": last["loss"], "accuracy": last["accuracy"],
                    "bytes": size, "wall_s": result.state.wall_s, "teacher_share": result.teacher_share,
                }
            )  # fmt: skip
            print(json.dumps(records[-1]), flush=True)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Per arm: mean and standard deviation of the loss, and the mean difference to the live teacher, seed by seed."""
    full = {r["seed"]: r["loss"] for r in records if r["arm"] == "full"}
    lines = [f"{'target':<24}{'bytes/token':>12}{'share':>8}{'val loss':>10}{'sd':>8}{'- full':>9}{'sd':>8}{'s':>6}"]
    for arm in dict.fromkeys(r["arm"] for r in records):
        rows = [r for r in records if r["arm"] == arm]
        losses, gaps = [r["loss"] for r in rows], [r["loss"] - full[r["seed"]] for r in rows]
        size = statistics.mean(r["bytes"] for r in rows)
        seconds = statistics.median(r["wall_s"] for r in rows)
        spread = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in (losses, gaps)]
        lines.append(
            f"{rows[0]['name']:<24}{size:>12.1f}{size / FULL_BYTES:>8.3f}{statistics.mean(losses):>10.4f}"
            f"{spread[0]:>8.4f}{statistics.mean(gaps):>+9.4f}{spread[1]:>8.4f}{seconds:>6.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--draws", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--stratified", action="store_true", help="one more arm")
    parser.add_argument("--only", nargs="+", default=[], help="keys of arms to run now; a later run takes them up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/sampled_kd"), help="corpus, models and caches; resumed")
    parser.add_argument("--out", type=Path, help="write records and machine as JSON")
    a = parser.parse_args()
    records = run(a)
    if not a.only:
        print(table(records))
    if a.out:
        case = {key: value for key, value in vars(a).items() if key not in ("work", "out", "only")}
        model = asdict(student(a.width).model)
        a.out.write_text(
            json.dumps({**case, "student": model, **runner.machine(), "records": records}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
