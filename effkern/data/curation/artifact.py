"""What every step of curation leaves behind: a folder of arrays, and a manifest that says from what they were made.

The arrays are .npy without objects. The manifest comes last, so that a folder without one is an unfinished step. Its
hash is over the kind, the settings, the hashes of what went in and of the arrays: the same step on the same inputs has
the same hash, whatever the paths.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effkern.data.lock import FileLock, InUse

FORMAT = "effkern-curation"
FORMAT_VERSION = 1
MANIFEST, PLAN, LOCK = "curation.json", ".plan.json", ".lock"


@dataclass(frozen=True)
class Artifact:
    """A finished step."""

    path: Path
    kind: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    """Hash of each thing that went in, by name."""
    arrays: dict[str, str]
    """sha256 of each array's file, by name."""
    results: dict[str, Any] = field(default_factory=dict)
    """Figures about it, for people; not in the hash."""
    places: dict[str, str] = field(default_factory=dict)
    """Where the inputs were; not in the hash."""

    @property
    def hash(self) -> str:
        content = {"format": [FORMAT, FORMAT_VERSION], "kind": self.kind, "settings": self.settings}
        content |= {"inputs": self.inputs, "arrays": self.arrays}
        return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def load(self, name: str, *, mapped: bool = False) -> NDArray:
        """An array, in memory or as a memory map, checked against its hash.

        Raises:
            ValueError: the step has no such array, or its file was changed; the message names it.
        """
        if name not in self.arrays:
            raise ValueError(f"{self.path}: must hold an array {name!r}, got {' '.join(sorted(self.arrays)) or 'none'}")
        file = self.path / f"{name}.npy"
        if not file.is_file():
            raise FileNotFoundError(f"curation: array is missing: {file}")
        if file_hash(file) != self.arrays[name]:
            raise ValueError(f"curation: file was changed after it was written (sha256 differs): {file}")
        return np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)


def file_hash(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Under a temporary name first: a file with its final name is whole and on the disk."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_array(path: Path, array: NDArray) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def begin(
    path: str | Path, kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str], overwrite: bool
) -> Iterator[Path]:
    """Make the folder of a step, or take up an unfinished one with the same settings and inputs; it is this process's
    alone until the end of the with block.

    Raises:
        FileExistsError: the folder holds a finished step and `overwrite` is False, or other files.
        ValueError: it holds an unfinished step that was made in another way, and `overwrite` is False.
        InUse: another process is writing to it (a RuntimeError); it is named.
    """
    folder = Path(path)
    plan = {"kind": kind, "settings": dict(settings), "inputs": dict(inputs)}
    # Before a lock is left in a folder that is somebody else's.
    _known(folder, kind)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK, lambda who: InUse(f"{kind}: another process is writing to {folder} ({who})")):
        _take_up(folder, kind, plan, overwrite)
        yield folder


def _known(folder: Path, kind: str) -> bool:
    """Whether the folder holds a step, finished or not."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise FileExistsError(f"{kind}: out must be a folder, got a file: {folder}")
    known = (folder / PLAN).exists() or (folder / MANIFEST).exists()
    if not known and any(entry.name != LOCK for entry in folder.iterdir()):
        raise FileExistsError(f"{kind}: out must be empty or hold a step of curation, got other files in {folder}")
    return known


def _take_up(folder: Path, kind: str, plan: Mapping[str, Any], overwrite: bool) -> None:
    """What may stay of an earlier call stays, the rest goes; the plan is written."""
    marker = folder / PLAN
    if _known(folder, kind):
        if (folder / MANIFEST).exists() and not overwrite:
            raise FileExistsError(f"{kind}: out must not hold a finished step unless overwrite is given, got {folder}")
        same = marker.exists() and json.loads(marker.read_text("utf-8")) == json.loads(json.dumps(plan))
        # A plan alone holds no work.
        begun = any(folder.glob(".part-*.npy"))
        if begun and not same and not overwrite:
            raise ValueError(f"{kind}: out holds an unfinished step with other settings or inputs: {folder}")
        if not same or (folder / MANIFEST).exists():
            _clear(folder)
    write_bytes(marker, (json.dumps(plan, indent=1) + "\n").encode())


def _clear(folder: Path) -> None:
    # The manifest first: from then on nothing finished stands here.
    (folder / MANIFEST).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.suffix in (".npy", ".jsonl") or _passing(entry):
            entry.unlink(missing_ok=True)


def _passing(entry: Path) -> bool:
    """Parts, the plan and temporary files."""
    return entry.name.startswith(".") and entry.name != LOCK


def finish(
    path: Path,
    kind: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    arrays: Mapping[str, NDArray],
    results: Mapping[str, Any] | None = None,
    places: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> Artifact:
    """Write the arrays and, last, the manifest; parts and the plan go.

    Args:
        files: sha256 of further files in the folder, which count as arrays do.
    """
    hashes = dict(files or {})
    for name, array in arrays.items():
        file = path / f"{name}.npy"
        write_array(file, array)
        hashes[name] = file_hash(file)
    # As a reader will find them.
    given, figures = json.loads(json.dumps([dict(settings), dict(results or {})]))
    found = Artifact(path, kind, given, dict(inputs), hashes, figures, dict(places or {}))
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "hash": found.hash, "kind": kind}
    body = {"settings": given, "inputs": found.inputs, "arrays": hashes, "results": figures, "places": found.places}
    write_bytes(path / MANIFEST, (json.dumps(head | body, indent=1) + "\n").encode())
    for entry in path.iterdir():
        if _passing(entry):
            entry.unlink(missing_ok=True)
    return found


def open_artifact(path: str | Path, *kinds: str) -> Artifact:
    """The finished step in `path`.

    Raises:
        FileNotFoundError: none is there.
        ValueError: its manifest is none, was changed, or is of another kind than `kinds`.
    """
    file = Path(path) / MANIFEST
    try:
        raw = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"curation: path must hold a finished step ({MANIFEST}), got {path}") from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file}: must be a manifest of format {FORMAT!r}, version {FORMAT_VERSION}")
    try:
        names = ("kind", "settings", "inputs", "arrays", "results", "places")
        found = Artifact(Path(path), *(raw[name] for name in names))
    except KeyError as error:
        raise ValueError(f"{file}: a field is missing ({error})") from None
    if found.hash != raw.get("hash"):
        raise ValueError(f"{file}: was changed after it was written (its hash does not match its content)")
    if kinds and found.kind not in kinds:
        raise ValueError(f"{file}: must be a step of kind {' or '.join(kinds)}, got {found.kind}")
    return found
