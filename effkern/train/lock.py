"""One process at a time may write to a run directory."""

import os
from pathlib import Path
from types import TracebackType

from effkern.train.parallel import ALONE, Alone


class RunLock:
    """Context manager around an advisory lock on `folder`/.lock; the system drops it when the process dies.

    Of several ranks, the main one takes it.
    """

    def __init__(self, folder: Path, parallel: Alone = ALONE) -> None:
        self.folder, self._parallel = folder, parallel
        self._handle = -1

    def __enter__(self) -> "RunLock":
        self._parallel.on_main(self._take)
        return self

    def _take(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            import fcntl
        except ImportError:  # not a Unix
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise ValueError(f"run.out must not be in use by another process, got {self.folder}") from None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle >= 0:
            os.close(self._handle)
