"""`write_soft_labels`: from a function that labels windows to a cache on disk, a shard at a time.

The folder holds spec.json and windows.bin first, then one file per finished shard, and manifest.json last. Whatever
stops the writer, the shards that have their final name are whole, and the next call goes on behind them.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effkern.data.dataset import PackedDataset
from effkern.data.lock import FileLock, InUse
from effkern.data.soft_labels_codec import LabelArrays
from effkern.data.soft_labels_shard import ShardFile, check_content, shard_name
from effkern.data.soft_labels_spec import MANIFEST, SPEC, WINDOWS, LabelManifest, LabelShard, LabelSpec, load_spec

Labeller = Callable[[NDArray[np.int64], NDArray[np.int64]], LabelArrays]
Progress = Callable[[int, int], None]

LOCK = ".write.lock"


@dataclass(frozen=True)
class WriteResult:
    """How far the writer came."""

    manifest: LabelManifest | None
    """None: it was asked to stop before the end."""
    kept: int
    """Shards that were there before."""
    windows: int
    """Windows labelled by this call."""


def windows_hash(windows: NDArray[np.int64]) -> str:
    """What LabelSpec.windows_sha256 holds."""
    return sha256(windows.astype("<i8", copy=False).tobytes()).hexdigest()


def write_soft_labels(
    out: str | Path,
    dataset: PackedDataset,
    spec: LabelSpec,
    windows: NDArray[np.int64],
    label: Labeller,
    *,
    batch_windows: int = 16,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> WriteResult:
    """Label `windows` of `dataset` and write a cache to the folder `out`, or go on with the one that is there.

    Args:
        out: folder to create. Finished shards in it are hashed and kept; half a shard is made again.
        spec: must describe `dataset` and `windows`.
        windows: int64, window numbers in the order in which training will read them, none twice.
        label: called with the input tokens of some windows [B, seq_len] and the position of each in the split, for
            batches that start at the same windows whether or not an earlier call was interrupted; returns the labels
            of their B * seq_len tokens.
        batch_windows: windows a call.
        overwrite: throw away a cache in `out` that was made from another spec, and what is damaged of this one.
        progress: called with (windows done, windows in all).
        stop: asked after every batch; True ends the call, and the shard begun is made again next time.

    Raises:
        ValueError: `out` holds a cache of another spec and `overwrite` is False (every difference is named); a label
            is not finite; a finished shard was changed, or the spec cannot be read, and `overwrite` is False.
        FileExistsError: `out` holds other files.
        OSError: the disk is full or fails. Finished shards stay, and nothing half-written does.
        InUse: another process is writing to `out` (a RuntimeError).
    """
    assert spec.windows_sha256 == windows_hash(windows)
    path = Path(out)
    with _locked(path):
        _prepare(path, spec, windows, overwrite)
        shards: list[LabelShard] = []
        kept = made = done = 0
        for number in range(spec.num_shards):
            first, size = number * spec.shard_windows, spec.shard_size(number)
            finished = _finished(path, spec, number, overwrite)
            if finished is not None:
                shards.append(finished)
                kept += 1
                done += size
                _report(progress, done, spec)
                continue
            shard = _Shard(path, dataset, spec, number, label)
            batches = range(first, first + size, batch_windows)
            for start in batches:
                if stop():
                    shard.discard()
                    return WriteResult(None, kept, made)
                count = min(batch_windows, first + size - start)
                shard.add(windows[start : start + count])
                done, made = done + count, made + count
                _report(progress, done, spec)
            shards.append(shard.finish())
        manifest = LabelManifest(spec, tuple(shards))
        _write(path, MANIFEST, manifest.to_json().encode())
        return WriteResult(manifest, kept, made)


def _finished(path: Path, spec: LabelSpec, number: int, overwrite: bool) -> LabelShard | None:
    """A shard that is there and whole. A damaged one raises, or goes if what is there may be thrown away."""
    file = path / shard_name(number)
    if not file.exists():
        return None
    try:
        return check_content(file, spec, number)
    except ValueError as error:
        if not overwrite:
            raise ValueError(f"{error} (overwrite writes it again)") from error
    for name in (MANIFEST, shard_name(number)):
        (path / name).unlink(missing_ok=True)
    return None


def _report(progress: Progress | None, done: int, spec: LabelSpec) -> None:
    if progress is not None:
        progress(done, spec.num_windows)


class _Shard:
    """A shard while it is made: whatever fails, nothing of it stays."""

    def __init__(self, path: Path, dataset: PackedDataset, spec: LabelSpec, number: int, label: Labeller) -> None:
        self._dataset, self._spec, self._number, self._label = dataset, spec, number, label
        self._file = self._guard(lambda: ShardFile(path, spec, number))

    def add(self, windows: NDArray[np.int64]) -> None:
        spec = self._spec
        starts = windows * spec.seq_len
        tokens = self._dataset.windows(spec.split, starts, spec.seq_len)
        try:
            packed = spec.codec.pack(self._label(tokens, starts[:, None] + np.arange(spec.seq_len)))
        except BaseException as error:
            self.discard()
            if isinstance(error, ValueError):
                raise ValueError(f"soft labels: windows {windows[0]} ... {windows[-1]}: {error}") from error
            raise
        self._guard(lambda: self._file.write(packed))

    def finish(self) -> LabelShard:
        return self._guard(self._file.finish)

    def discard(self) -> None:
        self._file.discard()

    def _guard(self, action: Callable):
        try:
            return action()
        except OSError as error:
            if hasattr(self, "_file"):
                self.discard()
            reason = error.strerror or str(error)
            message = (
                f"soft labels: shard {self._number} could not be written ({reason}); the {self._number} before it are "
                f"kept: make room and run the same command again"
            )
            raise OSError(message) from error


def _prepare(path: Path, spec: LabelSpec, windows: NDArray[np.int64], overwrite: bool) -> None:
    """Check what is in the folder, then put the spec and the list of windows there."""
    try:
        found = load_spec(path)
    except ValueError:
        # What cannot even be read is no reason to keep it.
        if not overwrite:
            raise
        found = None
    if found is None and any(entry.name != LOCK and not _own(entry.name) for entry in path.iterdir()):
        raise FileExistsError(f"soft labels: out must be empty or hold a soft-label cache, got other files in {path}")
    wrong = [] if found is None else found.differences(spec)
    if wrong and not overwrite:
        raise ValueError(
            f"soft labels: out must hold no cache of another kind unless overwrite is set, got {path} with\n  "
            + "\n  ".join(wrong)
        )
    for entry in path.iterdir():
        if entry.name.startswith(".tmp-") or ((found is None or wrong) and _own(entry.name)):
            entry.unlink()
    try:
        _write(path, WINDOWS, windows.astype("<i8", copy=False).tobytes())
        _write(path, SPEC, spec.to_json().encode())
    except OSError as error:
        raise OSError(f"soft labels: {path} could not be written ({error.strerror or error})") from error


def _own(name: str) -> bool:
    return name in (MANIFEST, SPEC, WINDOWS) or name.startswith((".tmp-", "labels-", ".verified.json"))


def _write(path: Path, name: str, content: bytes) -> None:
    """A small file, whole or not there, and durable together with every rename before it."""
    temporary = path / f".tmp-{name}"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path)
        os.replace(temporary, path / name)
        _sync_folder(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(path: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(path: Path) -> FileLock:
    """The folder, made, and the lock on it, to be entered."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"soft labels: out must be a folder, got a file: {path}")
    path.mkdir(parents=True, exist_ok=True)
    return FileLock(path / LOCK, lambda who: InUse(f"soft labels: another process is writing to {path} ({who})"))


def free_bytes(path: Path) -> int:
    """Room on the disk that `path`, or the nearest folder above it that exists, lies on."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
