"""`effkern ablate`: features alone and together, over seeds, at equal tokens.

The folder holds ARM/seed-S (run directories like any other), teacher/ where one was trained for it, ablation.json,
ablation.md and ablation.png. Runs that are done are not trained again, a stopped one goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from effkern.data import PackedDataset
from effkern.data.soft_labels import SoftLabelCache
from effkern.train.ablation_report import write_report
from effkern.train.checkpoint import CheckpointError, list_checkpoints, read_meta, resolve_checkpoint
from effkern.train.config import FREE_ON_RESUME, TrainConfig
from effkern.train.features import arms, parse_feature
from effkern.train.loop import train
from effkern.train.mapping import differences, overlay
from effkern.train.runs import read_run
from effkern.train.schedules import teacher_steps


class AblationInterrupted(RuntimeError):
    """A signal ended it; `signum` is its number."""

    def __init__(self, signum: int, out: Path) -> None:
        super().__init__(f"interrupted; what was trained is saved. Run the same command again to go on in {out}")
        self.signum = signum


@dataclass(frozen=True)
class Ablation:
    """What is trained: `config` with its features switched, for every seed."""

    config: TrainConfig
    features: tuple[str, ...]
    """See effkern.train.features.parse_feature."""
    out: Path
    seeds: int = 3
    grid: str = "each"
    teacher: TrainConfig | None = None
    """Trained first, where an arm needs a teacher and the config names no checkpoint that exists."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")

    def arms(self) -> dict[str, TrainConfig]:
        """The arms with the first seed, in no folder yet."""
        return arms(self.config, [parse_feature(text) for text in self.features], self.grid)

    def runs(self, teacher: str = "") -> dict[str, list[TrainConfig]]:
        """The runs of every arm, by seed; arms with the same seed start alike and see the same batches in order."""
        first = self.config.run.seed
        return {
            name: [_placed(arm, self.out / name / f"seed-{seed}", seed, teacher)
                   for seed in range(first, first + self.seeds)]
            for name, arm in self.arms().items()
        }  # fmt: skip


def _placed(config: TrainConfig, out: Path, seed: int, teacher: str) -> TrainConfig:
    config = replace(
        config, data=replace(config.data, seed=seed), run=replace(config.run, out=str(out), seed=seed, restart=False)
    )
    if not _needs_teacher(config):
        # An arm without a teacher does not depend on one.
        return replace(config, teacher=replace(config.teacher, checkpoint="", cache=""))
    return replace(config, teacher=replace(config.teacher, checkpoint=teacher)) if teacher else config


def _needs_teacher(config: TrainConfig) -> bool:
    return teacher_steps(config.schedule) > 0


def run_ablation(ablation: Ablation, *, quiet: bool = False) -> dict[str, Any]:
    """Train what is not done, and write the report; returns what ablation.json holds.

    Raises:
        AblationInterrupted: SIGINT or SIGTERM; the same call goes on.
        ValueError, CheckpointError: features, data, teacher or a stored run do not fit; stored runs are not touched.
    """
    dataset = PackedDataset(ablation.config.data.path)
    grid = ablation.arms()
    teacher = ""
    if any(_needs_teacher(arm) and not arm.teacher.cache for arm in grid.values()):
        teacher = _teacher(ablation, dataset, quiet)
    runs = ablation.runs(teacher)
    for name, configs in runs.items():
        for config in configs:
            _train(config, f"{name} {Path(config.run.out).name}", ablation.out, quiet)
    return write_report(ablation.out, runs, dataset)


def _teacher(ablation: Ablation, dataset: PackedDataset, quiet: bool) -> str:
    """The checkpoint that the config names if it is there, else a teacher trained for the ablation."""
    named = ablation.config.teacher.checkpoint
    try:
        return str(resolve_checkpoint(Path(named)).parent.parent) if named else _trained(ablation, dataset, quiet)
    except CheckpointError:
        if ablation.teacher is None:
            raise
        return _trained(ablation, dataset, quiet)


def _trained(ablation: Ablation, dataset: PackedDataset, quiet: bool) -> str:
    if ablation.teacher is None:
        raise ValueError("teacher.checkpoint or teacher.cache must be given for an arm with a teacher, got neither")
    out = ablation.out / "teacher"
    config = replace(
        ablation.teacher,
        data=replace(ablation.teacher.data, path=str(dataset.path)),
        run=replace(ablation.teacher.run, out=str(out), restart=False),
    )
    _train(config, "teacher", ablation.out, quiet)
    return str(out)


def _train(config: TrainConfig, title: str, out: Path, quiet: bool) -> None:
    if is_done(config):
        if not quiet:
            print(f"{title}: done in {config.run.out}", flush=True)
        return
    result = train(config, title=title, quiet=quiet)
    if result.signum is not None:
        raise AblationInterrupted(result.signum, out)


def is_done(config: TrainConfig) -> bool:
    """Whether config.run.out holds the finished run of this very config on this data."""
    out = Path(config.run.out)
    found = list_checkpoints(out / "checkpoints")
    if not found or not read_run(out).finished:
        return False
    try:
        meta = read_meta(found[-1])
    except CheckpointError:
        return False
    stored = asdict(overlay(TrainConfig(), meta["config"], source=f"checkpoint {found[-1]}"))
    if differences(stored, config, FREE_ON_RESUME) or meta["inputs"]["dataset"] != PackedDataset(config.data.path).hash:
        return False
    _check_teacher(config, meta["inputs"], found[-1])
    return True


def _check_teacher(config: TrainConfig, inputs: Mapping[str, str], checkpoint: Path) -> None:
    """Whose labels a finished run had: the trainer loads no teacher for it any more, and would not ask.

    Raises:
        CheckpointError: another teacher's.
    """
    if not _needs_teacher(config):
        return
    if config.teacher.cache:
        stored, now = inputs.get("labels", ""), SoftLabelCache(config.teacher.cache).hash
    else:
        teacher = read_meta(resolve_checkpoint(Path(config.teacher.checkpoint)))
        stored, now = inputs.get("teacher", ""), teacher["files"]["model.safetensors"]
    if stored != now:
        raise CheckpointError(
            f"checkpoint {checkpoint} had another teacher ({stored[:12] or 'none'}, now {now[:12]}); nothing was "
            "overwritten. Choose another --out."
        )


def plan(ablation: Ablation) -> str:
    """What would be trained, a line a run, and what of it is done."""
    return "\n".join(_lines(ablation.runs()))


def _lines(runs: Mapping[str, Sequence[TrainConfig]]) -> list[str]:
    return [
        f"{config.run.out}: {config.model.residual} residual, {config.model.loop.stages or config.model.num_layers} "
        f"layers, {config.optimizer.name}, {config.schedule.mode}{', done' if is_done(config) else ''}"
        for configs in runs.values()
        for config in configs
    ]
