"""`effkern ablate`: which of the methods help, alone and together, at equal tokens."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from effkern.cli_settings import starting_point
from effkern.train.config import TrainConfig
from effkern.train.presets import PRESETS


def ablate(arguments: Sequence[str]) -> int:
    """Train the grid and print its table."""

    @dataclass
    class Ablate:
        """Train a config with features off, with each alone and with all of them, over seeds, at equal tokens.

        Writes ablation.md, ablation.json and ablation.png; runs that are done are kept, so that the same command goes
        on after a stop. Where SALT needs a teacher that does not exist, the preset's is trained first.
        """

        settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
        features: tuple[str, ...] = ("laurel", "looped", "shampoo", "salt")
        """laurel, looped, shampoo, salt, or NAME=FILE.toml: a config file laid over the others."""
        seeds: int = 3
        """Of weights and data order: run.seed and the next ones."""
        grid: Literal["each", "full"] = "each"
        """full: every subset of the features."""
        out: Path = Path("runs/ablation")
        """Folder of the runs and of the report."""
        teacher_steps: int = 0
        """Steps of a teacher that is trained first; 0: its preset's."""
        preset: str = ""
        """Any of `effkern train`'s; without one and without --config: demo."""
        config: str = ""
        """TOML file as of `effkern train`."""
        dry_run: bool = False
        """Print the runs, and stop."""

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise NotImplementedError("ablate trains in one process; torchrun is for effkern train")
    start = starting_point(arguments, "demo")
    default = Ablate(start.base, preset=start.preset, config=start.config)
    command = tyro.cli(Ablate, args=list(arguments), default=default, prog="effkern ablate")

    from effkern.train.ablate import Ablation, AblationInterrupted, plan, run_ablation

    teacher = PRESETS[start.chosen.teacher].config if start.chosen and start.chosen.teacher else None
    if teacher is not None:
        run, schedule = command.settings.run, teacher.schedule
        teacher = replace(
            teacher,
            schedule=replace(schedule, steps=command.teacher_steps or schedule.steps),
            run=replace(teacher.run, device=run.device, precision=run.precision, threads=run.threads),
        )
    ablation = Ablation(command.settings, command.features, command.out, command.seeds, command.grid, teacher)
    if command.dry_run:
        print(plan(ablation))
        return 0
    try:
        run_ablation(ablation)
    except AblationInterrupted as stop:
        print(stop)
        return 128 + stop.signum
    print((command.out / "ablation.md").read_text().split("![curves]")[0])
    print(f"report: {', '.join(str(command.out / f'ablation.{end}') for end in ('md', 'json', 'png'))}")
    return 0
