"""The folder of a dataset while it is written: temporary names, renames, one builder at a time.

The manifest is renamed into place last. Until then a new folder holds no dataset, and a folder that is built over
still holds the old one whole: new files never take a name that the old manifest speaks of.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effkern.data.lock import FileLock, InUse
from effkern.data.manifest import MANIFEST, Manifest, load_manifest

LOCK = ".build.lock"
TEMPORARY = ".tmp-"


# Names that a build gives; everything else in the folder is left alone.
OWN_NAMES = re.compile(r"(train|val)-\d{5,}(\.\d+)?\.bin|tokenizer(\.\d+)?\.json|\.tmp-.*|\.verified\.json.*")


class BuildFolder:
    """Gives out names below `path` and knows which of them the dataset that stands there uses."""

    def __init__(self, path: Path, taken: set[str]) -> None:
        self.path = path
        self.taken = taken

    def free_name(self, name: str) -> str:
        """`name`, or name.2, name.3 ... (before the suffix) where the old dataset uses it."""
        stem, suffix = os.path.splitext(name)
        number = 1
        while name in self.taken:
            number += 1
            name = f"{stem}.{number}{suffix}"
        return name

    def temporary(self, name: str) -> Path:
        return self.path / (TEMPORARY + name)

    def publish(self, name: str) -> None:
        """Give a temporary file, written and synced, its final name."""
        os.replace(self.temporary(name), self.path / name)

    def write(self, name: str, content: bytes) -> None:
        with self.temporary(name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.publish(name)

    def finish(self, manifest: Manifest) -> None:
        """From here on the new dataset stands."""
        _sync_folder(self.path)
        self.write(MANIFEST, manifest.to_json().encode())
        _sync_folder(self.path)
        self.taken = manifest.files()

    def sweep(self) -> None:
        """Remove what builds left here and no dataset uses."""
        for entry in self.path.iterdir():
            if OWN_NAMES.fullmatch(entry.name) and entry.name not in self.taken:
                entry.unlink(missing_ok=True)


@contextmanager
def build_folder(path: Path, overwrite: bool) -> Iterator[BuildFolder]:
    """Lock `path` for one build.

    Raises:
        FileExistsError: a finished dataset stands there and `overwrite` is False, or the folder holds other files.
        InUse: another build is writing to it.
    """
    created = not path.exists()
    _check_out(path, overwrite)
    path.mkdir(parents=True, exist_ok=True)
    with FileLock(path / LOCK, lambda who: InUse(f"build_dataset: another build is writing to {path} ({who})")):
        # Again under the lock: another build may have finished in between.
        _check_out(path, overwrite)
        folder = BuildFolder(path, _names(path))
        folder.sweep()
        try:
            yield folder
        except BaseException:
            folder.sweep()
            if created:
                (path / LOCK).unlink()
                path.rmdir()
            raise
        folder.sweep()


def _check_out(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"build_dataset: out must be a folder, got a file: {path}")
    if (path / MANIFEST).exists():
        if not overwrite:
            raise FileExistsError(f"build_dataset: out must not hold a dataset unless overwrite=True, got {path}")
    elif not (path / LOCK).exists() and any(path.iterdir()):
        raise FileExistsError(f"build_dataset: out must be empty or hold a dataset, got other files in {path}")


def _names(path: Path) -> set[str]:
    """Names that the dataset in `path` uses; every file there, where its manifest cannot be read."""
    if not (path / MANIFEST).exists():
        return set()
    try:
        return load_manifest(path).files()
    except (ValueError, OSError):
        return {entry.name for entry in path.iterdir()}


def _sync_folder(path: Path) -> None:
    """Make renames durable before the manifest that speaks of them."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
