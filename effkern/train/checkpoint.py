"""Checkpoints that survive a crash at any moment: directories step-XXXXXXXX made of safetensors and JSON.

A checkpoint is written to a temporary directory, every file and the directory are fsynced, and one rename publishes
it. Older ones are deleted only after that. meta.json lists the SHA-256 of every file, and of itself.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT_VERSION = 1
_STEP_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message names it and says what to do."""


@dataclass
class Checkpoint:
    """What one checkpoint holds: tensors by file, and JSON data by name."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    data: dict[str, Any]
    path: Path | None = None
    problems: dict[Path, str] = field(default_factory=dict)
    """Newer checkpoints that are not intact, and what is wrong with them."""


def list_checkpoints(root: Path) -> list[Path]:
    """Published checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _meta_hash(meta: Mapping[str, Any]) -> str:
    body = {key: value for key, value in meta.items() if key != "meta_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    files = {}
    for name, tensors in checkpoint.tensors.items():
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        _fsync(path)
        files[path.name] = file_hash(path)
    write_meta(folder, checkpoint, files)


def write_meta(folder: Path, checkpoint: Checkpoint, files: Mapping[str, str], **extra: str) -> None:
    """meta.json: the checkpoint's data, and the hashes of `files` and of itself."""
    meta = {"format_version": FORMAT_VERSION, "step": checkpoint.step, "files": files, **extra, **checkpoint.data}
    meta = json.loads(json.dumps(meta))
    meta["meta_sha256"] = _meta_hash(meta)
    path = folder / "meta.json"
    path.write_text(json.dumps(meta, indent=1))
    _fsync(path)


def staging(root: Path, step: int) -> Path:
    """An empty temporary directory for the checkpoint of `step`; leftovers of a killed process go."""
    root.mkdir(parents=True, exist_ok=True)
    for path in root.glob(".tmp-*"):
        shutil.rmtree(path)
    temporary = root / f".tmp-step-{step:08d}"
    temporary.mkdir()
    return temporary


def publish(root: Path, folder: Path, step: int, keep_last: int) -> Path:
    """Make the complete `folder` the checkpoint of `step`, in place of one that is there; delete the oldest."""
    final = root / f"step-{step:08d}"
    _fsync(folder)
    if final.exists():
        shutil.rmtree(final)
    os.rename(folder, final)
    _fsync(root)
    for path in list_checkpoints(root)[:-keep_last]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Write and publish `checkpoint`, then delete all but the newest `keep_last`.

    A published intact checkpoint of the same step is left as it is.

    Raises:
        CheckpointError: it could not be written (disk full, no permission). What was there before is untouched.
    """
    final = root / f"step-{checkpoint.step:08d}"
    temporary = root / f".tmp-{final.name}"
    try:
        if final.exists() and problem(final) is None:
            return final
        temporary = staging(root, checkpoint.step)
        _write(temporary, checkpoint)
        return publish(root, temporary, checkpoint.step, keep_last)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        older = list_checkpoints(root)
        newest = f"the newest one is {older[-1]}" if older else "there is none before it"
        raise CheckpointError(f"checkpoint {final} could not be written ({error}); {newest}") from error


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to damaged-step-XXXXXXXX, so that it no longer counts among the last ones kept."""
    target = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    return path.rename(target)


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a checkpoint, checked against its own hash. Raises CheckpointError."""
    try:
        meta = json.loads((path / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: meta.json is missing or cut short ({error})") from error
    if not isinstance(meta, dict) or meta.get("meta_sha256") != _meta_hash(meta):
        raise CheckpointError(f"checkpoint {path}: meta.json was changed (its hash does not match)")
    if meta["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path}: format_version must be {FORMAT_VERSION}, got {meta['format_version']}"
        )
    return meta


def problem(path: Path, only: Collection[str] | None = None) -> str | None:
    """None if the checkpoint (or its files `only`, named without suffix) is intact, else what is wrong with it."""
    return problem_of(path, only)


def problem_of(path: Path, only: Collection[str] | None = None, part: tuple[int, int] = (0, 1)) -> str | None:
    """`problem`, where rank r of p (`part`) looks at every p-th file from the r-th on."""
    try:
        meta = read_meta(path)
        mine = sorted(meta["files"].items())[part[0] :: part[1]]
        for name, digest in mine:
            whole = meta.get("layout") != "sharded"
            if whole and only is not None and name.removesuffix(".safetensors") not in only:
                continue
            if not (path / name).is_file():
                return f"checkpoint {path}: {name} is missing"
            if file_hash(path / name) != digest:
                return f"checkpoint {path}: {name} is cut short or was changed (its hash does not match)"
    except CheckpointError as error:
        return str(error)
    return None


def load_checkpoint(path: Path, only: Collection[str] | None = None) -> Checkpoint:
    """Read one checkpoint, or its tensor files `only`. Raises CheckpointError if what is read is not intact."""
    wrong = problem(path, only)
    if wrong is not None:
        raise CheckpointError(wrong)
    meta = read_meta(path)
    if meta.get("layout") == "sharded":
        from effkern.train.shards import read_shards

        return Checkpoint(step=meta["step"], tensors=read_shards(path, only=only), data=meta, path=path)
    names = [name.removesuffix(".safetensors") for name in meta["files"]]
    tensors = {name: load_file(path / f"{name}.safetensors") for name in names if only is None or name in only}
    return Checkpoint(step=meta["step"], tensors=tensors, data=meta, path=path)


def load_newest(root: Path) -> Checkpoint | None:
    """The newest intact checkpoint under `root`; what is wrong with newer ones is in its `problems`.

    Returns None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are some and none is intact.
    """
    problems: dict[Path, str] = {}
    for path in reversed(list_checkpoints(root)):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            problems[path] = str(error)
        else:
            checkpoint.problems = problems
            return checkpoint
    if problems:
        raise CheckpointError("no checkpoint is intact, nothing was overwritten:\n  " + "\n  ".join(problems.values()))
    return None


def resolve_checkpoint(path: Path) -> Path:
    """A step directory itself, or the newest intact one of a run directory or of its checkpoints/ folder.

    Raises:
        CheckpointError: there is none.
    """
    if _STEP_NAME.fullmatch(path.name) and path.is_dir():
        return path
    for root in (path / "checkpoints", path):
        for candidate in reversed(list_checkpoints(root)):
            if problem(candidate) is None:
                return candidate
    raise CheckpointError(f"no intact checkpoint under {path} (a run directory or a step-XXXXXXXX directory)")
