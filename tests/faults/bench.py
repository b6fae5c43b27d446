"""Where cases run, and what they count."""

import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effkern.train.config import TrainConfig
from effkern.train.loop import train
from tests.faults.runs import changed, outcome


@dataclass
class Found:
    """What a case came to."""

    case: str
    trials: int = 0
    exact: int = 0
    detected: int = 0
    """Trials in which the fault was reported, where it must be; the message names the file."""
    steps_repeated: int = 0
    """Steps that had to be computed again, over all trials: the work lost."""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """A place for runs, a source of random moments, and the undisturbed runs to compare with."""

    def __init__(self, folder: Path, config: TrainConfig, seed: int) -> None:
        self.folder, self.config, self.rng = folder, config, random.Random(seed)
        self._count = 0
        self._alone: dict[str, Any] = {}

    def fresh(self, config: TrainConfig) -> TrainConfig:
        """`config` with a run directory of its own."""
        self._count += 1
        return changed(config, run__out=str(self.folder / f"run-{self._count}"))

    def undisturbed(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once."""
        if name not in self._alone:
            self._alone[name] = make()
        return self._alone[name]

    def alone(self, config: TrainConfig) -> Any:
        """The outcome of `config` left alone, in this process."""

        def make() -> Any:
            own = self.fresh(config)
            train(own, quiet=True)
            return outcome(Path(own.run.out))

        settings = asdict(config)
        settings.pop("run")
        return self.undisturbed(repr(settings), make)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, as on a full disk."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
