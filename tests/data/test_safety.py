"""A dataset is whole or not there: damage is named, kills leave nothing half-built, the old stays until the new is."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from effkern.data import PackedDataset, build_dataset, load_manifest
from effkern.data.build import _Build
from effkern.data.folder import build_folder

Build = Callable[..., PackedDataset]
VISIBLE = ["manifest.json", "tokenizer.json", "train-00000.bin", "val-00000.bin"]


def visible(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_shard_cut_short(build: Build) -> None:
    path = build().path
    shard = path / "train-00000.bin"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    with pytest.raises(ValueError) as error:
        PackedDataset(path, verify=False)
    assert str(error.value) == f"PackedDataset: shard must have {size} bytes, got {size - 1}: {shard}"
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard is missing: .*train-00000\.bin"):
        PackedDataset(path)


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin", "tokenizer.json"])
def test_flipped_bit_is_found_at_opening(build: Build, name: str) -> None:
    path = build().path
    flip(path / name, 100)
    with pytest.raises(ValueError) as error:
        PackedDataset(path)
    assert str(error.value) == f"PackedDataset: file was changed after the build (sha256 differs): {path / name}"


def test_verified_files_are_not_hashed_again(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build().path
    for name in VISIBLE:
        os.utime(path / name, (1e9, 1e9))
    PackedDataset(path)
    hashed: list[str] = []
    monkeypatch.setattr("effkern.data.dataset._check_hash", lambda file, digest: hashed.append(file.name))
    PackedDataset(path)
    assert hashed == []
    PackedDataset(path, verify=True)
    assert sorted(hashed) == VISIBLE[1:]
    hashed.clear()
    os.utime(path / "val-00000.bin", (1e9, 1e9 + 1))
    PackedDataset(path)
    assert hashed == ["val-00000.bin"]
    hashed.clear()
    (path / ".verified.json").write_text("[]")
    PackedDataset(path)
    assert sorted(hashed) == VISIBLE[1:]


def test_changed_tokenizer_is_refused(build: Build) -> None:
    path = build().path
    dataset = PackedDataset(path)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"changed after the build \(sha256 differs\): .*tokenizer\.json"):
        dataset.tokenizer()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["splits"]["train"].update(tokens=5), "was changed after the build"),
        (lambda raw: raw.update(format_version=2), "format_version must be 1, got 2"),
        (lambda raw: raw.update(format="other"), "must be a manifest of format 'effkern-tokens'"),
        (lambda raw: raw.pop("tokenizer"), "a field is missing or malformed"),
        (lambda raw: raw["shards"][0].update(file="../x"), "file names must have no folder, got '../x'"),
    ],
)
def test_changed_manifest(build: Build, change: Callable[[dict], None], message: str) -> None:
    path = build().path
    raw = json.loads((path / "manifest.json").read_text())
    change(raw)
    (path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError) as error:
        PackedDataset(path)
    assert str(path / "manifest.json") in str(error.value)
    assert message in str(error.value)
    (path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        PackedDataset(path)


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold a manifest\.json, got no such folder"):
        PackedDataset(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="got an unfinished build or another folder"):
        PackedDataset(tmp_path)


KILLED = """
import os, signal, sys
from effkern.data import build_dataset
from effkern.data.folder import BuildFolder
BuildFolder.finish = lambda self, manifest: os.kill(os.getpid(), signal.SIGKILL)
build_dataset(sys.argv[1], [sys.argv[2]], vocab_size=300, val_fraction=0.2, overwrite=True, seed=int(sys.argv[3]))
"""


def build_and_kill(out: Path, corpus: Path, seed: int) -> None:
    """A build that is killed when all shards are written and the manifest is not."""
    result = subprocess.run([sys.executable, "-c", KILLED, str(out), str(corpus), str(seed)], check=False)
    assert result.returncode == -signal.SIGKILL


def test_kill_before_the_manifest(build: Build, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_and_kill(out, corpus, 0)
    assert visible(out) == VISIBLE[1:]
    (out / "train-00007.bin").write_bytes(b"of a longer build")
    with pytest.raises(FileNotFoundError, match="unfinished build"):
        PackedDataset(out)
    # The same call again starts over, without overwrite, and clears what was left.
    rebuilt = build()
    assert visible(out) == VISIBLE
    assert not list(out.glob(".tmp-*"))
    old = rebuilt.read("train").tolist()

    build_and_kill(out, corpus, 1)
    survived = PackedDataset(out, verify=True)
    assert (survived.hash, survived.read("train").tolist()) == (rebuilt.hash, old)
    build(seed=1, overwrite=True)
    assert len(visible(out)) == 4


def test_finished_dataset_is_replaced_only_on_request(build: Build) -> None:
    first = build()
    tokens, hash_before = first.read("train").tolist(), first.hash
    with pytest.raises(FileExistsError, match="must not hold a dataset unless overwrite=True"):
        build(seed=1)
    assert PackedDataset(first.path, verify=True).hash == hash_before
    second = build(seed=1, vocab_size=310, overwrite=True)
    assert second.hash != hash_before
    assert second.vocab_size == 310
    assert PackedDataset(first.path, verify=True).hash == second.hash
    # The files of the first are gone, but who had it open reads on.
    assert len(visible(first.path)) == 4
    assert first.read("train").tolist() == tokens
    assert build(overwrite=True).hash == hash_before
    assert visible(first.path) == VISIBLE


def test_failed_build_leaves_the_old_dataset(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_Build, "manifest", full)
    with pytest.raises(OSError, match="No space left"):
        build(seed=1, overwrite=True)
    assert visible(first.path) == VISIBLE
    assert PackedDataset(first.path, verify=True).hash == first.hash
    with pytest.raises(OSError, match="No space left"):
        build("fresh")
    assert not (first.path.parent / "fresh").exists()


def test_broken_manifest_can_be_replaced(build: Build) -> None:
    path = build().path
    (path / "manifest.json").write_text("{")
    rebuilt = build(overwrite=True)
    assert PackedDataset(path, verify=True).hash == rebuilt.hash
    assert len(visible(path)) == 4


def test_foreign_folders_are_left_alone(build: Build, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="out must be empty or hold a dataset, got other files in"):
            build(overwrite=overwrite)
    assert visible(out) == ["tokenizer.json"]
    with pytest.raises(FileExistsError, match="out must be a folder, got a file"):
        build("out/tokenizer.json")


def test_bad_jsonl_leaves_nothing(build: Build, corpus: Path, tmp_path: Path) -> None:
    (corpus / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not valid JSON"):
        build()
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the lock needs fcntl")
def test_one_builder_at_a_time(build: Build, tmp_path: Path) -> None:
    with (
        build_folder(tmp_path / "out", False),
        pytest.raises(RuntimeError, match="another build is writing to"),
    ):
        build()


def test_workers_open_by_path(build: Build) -> None:
    dataset = build()
    function, arguments = dataset.__reduce__()
    assert arguments == (dataset.path,)
    assert function(*arguments).read("val").tolist() == dataset.read("val").tolist()


def test_manifest_holds_no_path_of_this_machine_in_its_hash(build: Build, tmp_path: Path) -> None:
    dataset = build()
    moved = tmp_path / "moved"
    dataset.path.rename(moved)
    assert PackedDataset(moved).hash == load_manifest(moved).hash == dataset.hash


def test_build_needs_a_known_split(build: Build) -> None:
    dataset = build()
    with pytest.raises(ValueError, match="split must be one of train val, got 'test'"):
        dataset.num_tokens("test")
    with pytest.raises(ValueError, match="must have 0 <= start <= stop <= "):
        dataset.read("train", 5, 4)
    assert build_dataset.__kwdefaults__["overwrite"] is False
