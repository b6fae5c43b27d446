"""What the user sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """Receives the state of a run."""

    def update(self, step: int, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class SilentReporter:
    """Shows nothing (tests, libraries)."""

    def update(self, step: int, text: str) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Shows nothing."""

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """What the log of a run gets; shows nothing of it."""

    def close(self) -> None:
        """Nothing is held."""


class BarReporter(SilentReporter):
    """A rich progress bar with tokens/s, loss and the time left."""

    def __init__(self, title: str, total: int, step: int, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(title, total=total, completed=step, text="")
        self._progress.start()

    def update(self, step: int, text: str) -> None:
        self._progress.update(self._task, completed=step, text=text)

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


class LineReporter(SilentReporter):
    """A line every `interval` seconds with the same facts, for logs and pipes."""

    def __init__(self, title: str, total: int, step: int, interval: float = 10.0) -> None:
        self._title, self._total, self._first, self._interval = title, total, step, interval
        self._start = self._last = time.monotonic()

    def update(self, step: int, text: str) -> None:
        now = time.monotonic()
        if now - self._last < self._interval and step != self._total:
            return
        self._last = now
        left = (now - self._start) / max(1, step - self._first) * (self._total - step)
        self.note(f"{self._title} {step}/{self._total} {text} ETA {left:.0f}s")

    def note(self, text: str) -> None:
        print(text, flush=True)


def reporter_for(title: str, total: int, step: int, *, quiet: bool = False) -> Reporter:
    """The reporter that fits standard output."""
    if quiet:
        return SilentReporter()
    console = Console()
    return BarReporter(title, total, step, console) if console.is_terminal else LineReporter(title, total, step)
