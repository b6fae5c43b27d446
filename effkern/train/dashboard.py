"""The terminal while a run trains: progress, the newest figures and the loss as a curve of blocks."""

import itertools
import resource
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from effkern.train.progress import Reporter, SilentReporter, reporter_for

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 60


def dashboard_for(title: str, total: int, step: int, stage_one: int, *, quiet: bool = False) -> Reporter:
    """A dashboard on a terminal; elsewhere what reporter_for gives. `stage_one`: leading steps with the teacher."""
    console = Console()
    if quiet or not console.is_terminal:
        return reporter_for(title, total, step, quiet=quiet)
    return DashboardReporter(title, total, step, stage_one, console)


class DashboardReporter(SilentReporter):
    """Progress and time left; loss, validation, learning rate, speed, memory and stage as the log gets them."""

    def __init__(self, title: str, total: int, step: int, stage_one: int, console: Console) -> None:
        self._total, self._step, self._stage_one = total, step, stage_one
        self._train: dict[str, Any] = {}
        self._eval: dict[str, Any] = {}
        self._losses: deque[float] = deque(maxlen=8 * CURVE)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task(title, total=total, completed=step)
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
        self._live.start()

    def update(self, step: int, text: str) -> None:
        self._step = step
        self._progress.update(self._task, completed=step)

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if kind == "eval":
            self._eval = values
        elif kind == "train":
            self._train = values
            self._losses.append(values["ce"])

    def note(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for _ in range(4):
            table.add_column(no_wrap=True)
        facts = self._facts()
        for left, right in zip(facts[::2], facts[1::2]):
            table.add_row(*left, *right)
        return Panel(Group(self._progress, table, sparkline(self._losses, CURVE)), expand=True)

    def _facts(self) -> list[tuple[str, str]]:
        train, validation = self._train, self._eval
        return [
            ("loss", f"{train['ce']:.4f}" if train else "-"),
            ("tokens/s", f"{train['tokens_per_s']:,.0f}" if train else "-"),
            ("validation", f"{validation['loss']:.4f}" if validation else "-"),
            ("tokens", f"{train['total_tokens']:,}" if train else "-"),
            ("accuracy", f"{100 * validation['accuracy']:.2f}%" if validation else "-"),
            ("memory", f"{peak_memory() / 2**20:,.0f} MiB at most"),
            ("learning rate", f"{train['lr']:.3e}" if train else "-"),
            ("gradient norm", f"{train['grad_norm']:.3f}" if train else "-"),
            ("stage", self._stage()),
            ("omega", f"{train['omega']:.3f}" if train else "-"),
        ]

    def _stage(self) -> str:
        if self._stage_one == 0:
            return "1 of 1, no teacher"
        if self._stage_one >= self._total:
            return "1 of 1, teacher"
        return f"1 of 2, teacher until {self._stage_one}" if self._step < self._stage_one else "2 of 2, no teacher"


def peak_memory() -> int:
    """Bytes: the largest allocation on the GPU where there is one, else the largest resident size of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` blocks between the smallest and the largest value, each the mean of a stretch; "" for none."""
    finite = [value for value in values if value - value == 0]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [len(finite) * i // count for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * (mean - low) / span) if span else 0] for mean in means)
