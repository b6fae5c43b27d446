"""One writer at a time: an advisory lock on a file, which falls with the process that holds it.

The file says who that is, and stays: what holds is the system's lock, not the file.
"""

import errno
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

# Whoever only looks holds the lock for some microseconds.
TRIES, PAUSE_S = 5, 0.02
SHOWN = 160
"""Characters of a command line."""
# Folders on a network without a service of locks, and the like.
WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class InUse(RuntimeError):
    """Another process is writing there."""


class FileLock:
    """Context manager: holds the lock on `path`, a file in a folder that exists. Where the system or the file system
    has no flock, nobody is kept out.

    Where another process (or another FileLock of this one) holds it, raises what `refuse` makes of who that is.
    """

    def __init__(self, path: Path, refuse: Callable[[str], Exception]) -> None:
        self.path, self._refuse = path, refuse
        self._handle = -1

    def __enter__(self) -> "FileLock":
        # Not inherited: a worker that outlives its parent does not hold what the parent held.
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        tries = TRIES
        try:
            while not _lock(handle, exclusive=True):
                tries -= 1
                if not tries:
                    raise self._refuse(_read(self.path))
                time.sleep(PAUSE_S)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        # On a full disk the lock holds without a name.
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.write(handle, _this_process().encode("utf-8", "backslashreplace"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def holder(path: Path) -> str | None:
    """Who holds the lock on `path`; None where nobody does, or where the system does not say."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return None if _lock(handle, exclusive=False) else _read(path)
    finally:
        os.close(handle)


def _lock(handle: int, *, exclusive: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # not a Unix
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
    return True


def _this_process() -> str:
    program = Path(sys.argv[0])
    # Of python -m effkern.
    name = program.parent.name if program.name == "__main__.py" else program.name
    command = shlex.join([name, *sys.argv[1:]])
    command = command if len(command) <= SHOWN else f"{command[:SHOWN]}..."
    return f"process {os.getpid()} on {socket.gethostname()}: {command}"


def _read(path: Path) -> str:
    """What the file says, in one line that a terminal can show."""
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(4 * SHOWN)
    return "".join(c if c.isprintable() else " " for c in text).strip() or "another process"
