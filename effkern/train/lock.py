"""One process at a time may write to a run directory."""

from pathlib import Path
from types import TracebackType

from effkern.data.lock import FileLock, holder
from effkern.train.parallel import ALONE, Alone

LOCK = ".lock"


class RunLock:
    """Context manager around the lock on `folder`/.lock; the system drops it when the process dies.

    Of several ranks, the main one takes it.

    Raises:
        ValueError: another process trains there; it is named.
    """

    def __init__(self, folder: Path, parallel: Alone = ALONE) -> None:
        self.folder, self._parallel = folder, parallel
        self._lock = FileLock(folder / LOCK, self._refuse)

    def __enter__(self) -> "RunLock":
        self._parallel.on_main(self._take)
        return self

    def _take(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.__enter__()

    def _refuse(self, who: str) -> ValueError:
        return ValueError(f"run.out must not be in use by another process, got {self.folder} ({who})")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, value, trace)


def trained_by(folder: Path) -> str | None:
    """The process that trains in `folder`; None where none does."""
    return holder(folder / LOCK)
