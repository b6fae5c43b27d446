"""What run directories hold: found below a folder, summarised, compared. Nothing is written or loaded as a model."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effkern.models import DecoderConfig, count_parameters
from effkern.train.checkpoint import CheckpointError, list_checkpoints, read_meta
from effkern.train.compare import value_at
from effkern.train.config import TrainConfig
from effkern.train.lock import trained_by
from effkern.train.log import read_log
from effkern.train.mapping import ConfigError, flatten, overlay

_INSIDE = ("checkpoints", "tensorboard", "wandb")


@dataclass(frozen=True)
class Run:
    """One run directory as its checkpoints' manifests, its log and its result describe it."""

    path: Path
    config: dict[str, Any] = field(repr=False)
    """As stored with the newest readable checkpoint; empty without one."""
    step: int
    """Of the newest readable checkpoint, or of the last record."""
    finished: bool
    """All steps of the config are done, and the result is written; or it is a merged model."""
    evals: list[dict[str, Any]] = field(repr=False)
    trained: list[dict[str, Any]] = field(repr=False)
    """Records of training steps."""
    problems: tuple[str, ...] = ()
    process: str | None = None
    """That trains there now, as its lock says."""

    @property
    def status(self) -> str:
        """running, finished, or stopped: nobody trains there, and steps are left."""
        return "running" if self.process else "finished" if self.finished else "stopped"

    @property
    def steps(self) -> int:
        """That the config asks for; 0 where there is none."""
        return self.config.get("schedule", {}).get("steps", 0)

    @property
    def parameters(self) -> int:
        """Of the model; 0 where the config does not say."""
        try:
            return count_parameters(overlay(DecoderConfig(), self.config["model"]))
        except (KeyError, ConfigError):
            return 0

    def figures(self) -> dict[str, Any]:
        """The newest numbers, None where there is none: loss, accuracy, bits_per_byte, tokens, wall_s."""
        last = self.evals[-1] if self.evals else {}
        names = ("loss", "accuracy", "bits_per_byte", "tokens")
        wall = self.trained[-1].get("wall_s") if self.trained else None
        return {**{name: last.get(name) for name in names}, "wall_s": wall}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but the records of training steps."""
        return {
            "path": str(self.path),
            "status": self.status,
            "process": self.process,
            "finished": self.finished,
            "step": self.step,
            "steps": self.steps,
            "parameters": self.parameters,
            **self.figures(),
            "evals": self.evals,
            "config": self.config,
            "problems": list(self.problems),
        }


def is_run(path: Path) -> bool:
    """Whether a folder has a run's log or checkpoints."""
    return (path / "log.jsonl").is_file() or bool(list_checkpoints(path / "checkpoints"))


def find_runs(root: Path) -> list[Path]:
    """Run directories at or below `root`, by name.

    Raises:
        ValueError: `root` is no folder.
    """
    if not root.is_dir():
        raise ValueError(f"runs: folder must exist, got {root}")
    found = []
    for folder, inside, _ in os.walk(root):
        inside[:] = sorted(name for name in inside if name not in _INSIDE and not name.startswith("."))
        if is_run(Path(folder)):
            found.append(Path(folder))
    return sorted(found)


def read_run(path: Path) -> Run:
    """Read one run directory. A checkpoint that is not readable is named among the problems.

    Raises:
        ValueError: it is none.
    """
    if not is_run(path):
        raise ValueError(f"runs: {path} must be a run directory (log.jsonl or checkpoints/), got another folder")
    meta: dict[str, Any] = {}
    problems = []
    for folder in reversed(list_checkpoints(path / "checkpoints")):
        try:
            meta = read_meta(folder)
            break
        except CheckpointError as error:
            problems.append(str(error))
    records = read_log(path / "log.jsonl")
    evals = [record for record in records if record["kind"] == "eval"]
    trained = [record for record in records if record["kind"] == "train"]
    step = meta.get("step", trained[-1]["step"] if trained else 0)
    config = meta.get("config", {})
    # What a fine-tuning leaves beside its run has no steps of its own.
    done = "merged" in meta or _result_step(path) == config.get("schedule", {}).get("steps", -1)
    return Run(path, config, step, done, evals, trained, tuple(problems), trained_by(path))


def _result_step(path: Path) -> int:
    try:
        return json.loads((path / "result.json").read_text())["state"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return -2


def names_of(runs: Sequence[Run]) -> list[str]:
    """Short names that tell the runs apart: their paths without what all have in common."""
    paths = [run.path.resolve() for run in runs]
    common = Path(os.path.commonpath(paths)) if len(set(paths)) > 1 else paths[0].parent
    return [str(path.relative_to(common)) for path in paths]


def changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a stored config that differ from the defaults, by "section.field"."""
    default = flatten(TrainConfig())
    return {name: value for name, value in flatten(config).items() if default.get(name) != value}


def compare_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Fields in which the configs differ, the last figures, and the losses at the tokens that all have reached.

    Raises:
        ValueError: fewer than two runs, or one without a validation.
    """
    if len(runs) < 2:
        raise ValueError(f"runs compare: needs at least two run directories, got {len(runs)}")
    without = [str(run.path) for run in runs if not run.evals]
    if without:
        raise ValueError(f"runs compare: every run must have a validation, got none in {', '.join(without)}")
    names = names_of(runs)
    flat = [flatten(run.config) for run in runs]
    keys = sorted(set().union(*flat) - {"run.out"})
    absent = "(absent)"
    settings = {
        key: [values.get(key, absent) for values in flat]
        for key in keys
        if any(values.get(key, absent) != flat[0].get(key, absent) for values in flat)
    }
    tokens = min(run.evals[-1]["tokens"] for run in runs)
    equal = [value_at(run.evals, "tokens", tokens) for run in runs]
    first = equal[0]
    return {
        "runs": names,
        "settings": settings,
        "final": [{"step": run.step, "parameters": run.parameters, **run.figures()} for run in runs],
        "equal_tokens": {
            "tokens": tokens,
            "loss": equal,
            "minus_first": [None if loss is None or first is None else loss - first for loss in equal],
        },
    }


def curves_of(runs: Iterable[Run], names: Iterable[str], x: str, y: str) -> dict[str, tuple[list[float], list[float]]]:
    """{name: (values of x, values of y)} over the validations; runs that have none are left out."""
    return {
        name: ([record[x] for record in run.evals], [record[y] for record in run.evals])
        for name, run in zip(names, runs)
        if run.evals
    }
