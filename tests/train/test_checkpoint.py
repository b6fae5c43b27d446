"""Checkpoints: exact round trip, and every way in which writing or reading one can go wrong."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from effkern.train import checkpoint as module
from effkern.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    problem,
    resolve_checkpoint,
    save_checkpoint,
)


def make(step: int, fill: float = 0.0) -> Checkpoint:
    model = {"w": torch.full((3, 5), fill + step), "half": torch.randn(4).bfloat16(), "scalar": torch.tensor(1.5)}
    return Checkpoint(step, {"model": model, "state": {"m": torch.randn(2, 2).double()}}, {"config": {"lr": 0.1 + 0.2}})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip_is_exact(tmp_path):
    stored = make(12)
    path = save_checkpoint(tmp_path, stored, keep_last=2)
    assert path.name == "step-00000012"
    found = load_checkpoint(path)
    for name, tensors in stored.tensors.items():
        for key, tensor in tensors.items():
            assert found.tensors[name][key].dtype == tensor.dtype
            assert torch.equal(found.tensors[name][key], tensor)
    assert (found.step, found.data["config"]) == (12, {"lr": 0.1 + 0.2})
    assert load_checkpoint(path, only=("model",)).tensors.keys() == {"model"}


def test_keep_last_deletes_only_older_ones(tmp_path):
    for step in (5, 10, 100000000, 20):
        save_checkpoint(tmp_path, make(step), keep_last=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000020", "step-100000000"]


def test_nothing_is_deleted_before_the_new_one_is_complete(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, make(1), keep_last=1)

    def fail(source, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(
        CheckpointError, match=r"step-00000002 could not be written .*Input/output error.*newest one is .*step-00000001"
    ):
        save_checkpoint(tmp_path, make(2), keep_last=1)
    assert names(tmp_path) == ["step-00000001"]
    assert problem(tmp_path / "step-00000001") is None


@pytest.mark.parametrize("nth", [0, 1])
def test_disk_full_leaves_the_previous_one(tmp_path, monkeypatch, nth):
    save_checkpoint(tmp_path, make(1), keep_last=2)
    real, calls = module.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > nth:
            Path(path).write_bytes(b"partial")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left on device"):
        save_checkpoint(tmp_path, make(2), keep_last=2)
    assert names(tmp_path) == ["step-00000001"]
    assert load_newest(tmp_path).step == 1
    monkeypatch.undo()
    save_checkpoint(tmp_path, make(2), keep_last=2)
    assert load_newest(tmp_path).step == 2


def test_a_real_full_disk(tmp_path):
    """A file size limit makes the writer of safetensors itself fail."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    save_checkpoint(tmp_path, make(1), keep_last=2)
    big = Checkpoint(2, {"model": {"w": torch.zeros(1 << 20)}}, {})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be written"):
            save_checkpoint(tmp_path, big, keep_last=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["step-00000001"]
    assert load_newest(tmp_path).step == 1


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(tmp_path):
    save_checkpoint(tmp_path, make(1), keep_last=2)
    (tmp_path / ".tmp-step-00000002").mkdir()
    (tmp_path / ".tmp-step-00000002" / "model.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path).step == 1
    save_checkpoint(tmp_path, make(3), keep_last=2)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def change_step(path: Path) -> None:
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "step": 99}))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", truncate, "model.safetensors is cut short or was changed"),
        ("model.safetensors", flip, "model.safetensors is cut short or was changed"),
        ("state.safetensors", Path.unlink, "state.safetensors is missing"),
        ("meta.json", truncate, "meta.json is missing or cut short"),
        ("meta.json", Path.unlink, "meta.json is missing or cut short"),
        ("meta.json", change_step, "meta.json was changed"),
    ],
)
def test_a_damaged_newest_one_is_named_and_the_previous_used(tmp_path, file, damage, message):
    save_checkpoint(tmp_path, make(1), keep_last=3)
    broken = save_checkpoint(tmp_path, make(2), keep_last=3)
    damage(broken / file)
    found = load_newest(tmp_path)
    assert found.step == 1
    assert list(found.problems) == [broken]
    assert str(broken) in found.problems[broken]
    assert message in found.problems[broken]
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(broken)
    assert resolve_checkpoint(tmp_path) == tmp_path / "step-00000001"
    # Training on from step 1 reaches step 2 again and replaces it.
    save_checkpoint(tmp_path, make(2, fill=0.5), keep_last=3)
    assert load_newest(tmp_path).tensors["model"]["w"][0, 0] == 2.5


def test_when_none_is_intact_nothing_is_overwritten(tmp_path):
    for step in (1, 2):
        truncate(save_checkpoint(tmp_path, make(step), keep_last=3) / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"(?s)no checkpoint is intact, nothing was overwritten.*step-00000002.*step-00000001"
    ):
        load_newest(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_an_intact_one_of_the_same_step_stays(tmp_path):
    path = save_checkpoint(tmp_path, make(4), keep_last=1)
    save_checkpoint(tmp_path, make(4, fill=1.0), keep_last=1)
    assert load_checkpoint(path).tensors["model"]["w"][0, 0] == 4.0


def test_other_format_version(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    path = save_checkpoint(tmp_path, make(1), keep_last=1)
    monkeypatch.undo()
    assert "format_version must be 1, got 2" in problem(path)


def test_empty_places(tmp_path):
    assert load_newest(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match=r"no intact checkpoint under .*none"):
        resolve_checkpoint(tmp_path / "none")
