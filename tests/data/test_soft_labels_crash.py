"""Real processes and real limits: kill -9 of the writer at random moments, and a disk that is full."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from effkern.data.soft_labels import SoftLabelCache
from effkern.data.soft_labels_shard import shard_name
from effkern.data.soft_labels_writer import write_soft_labels
from tests.data.soft_label_fixtures import Labeller, all_windows, spec_of

ROOT = Path(__file__).resolve().parents[2]


def start(dataset, out: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "tests.data.soft_label_fixtures", str(dataset.path), str(out)]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if not file.name.startswith(".")}


def test_kill_9_at_random_moments(build, tmp_path):
    dataset = build()
    windows = all_windows(dataset)
    spec = spec_of(dataset, windows)
    write_soft_labels(tmp_path / "whole", dataset, spec, windows, Labeller(dataset.vocab_size), batch_windows=2)
    out = tmp_path / "killed"
    rng = random.Random(1)
    shards = 0
    halves = 0
    for _ in range(2):
        process = start(dataset, out)
        deadline = time.monotonic() + 120
        # Past at least one more finished shard, so that the kills make progress.
        while len(list(out.glob("labels-*.bin"))) <= shards or not list(out.glob(".tmp-labels-*")):
            assert time.monotonic() < deadline
            if process.poll() is not None:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        halves += bool(list(out.glob(".tmp-*")))
        now = {file.name: file.stat().st_mtime_ns for file in out.glob("labels-*.bin")}
        shards = len(now)
        with pytest.raises(FileNotFoundError, match="an unfinished cache"):
            SoftLabelCache(out)
    assert halves
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("labels-*.bin")}
    process = start(dataset, out)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert content(out) == content(tmp_path / "whole")
    assert not list(out.glob(".tmp-*"))
    for name, stamp in kept.items():
        assert (out / name).stat().st_mtime_ns == stamp, "a finished shard was written again"


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_no_half_file(build, tmp_path):
    """A limit on the size of files stands for the disk; it strikes at each place where a shard is written."""
    import resource

    dataset = build()
    windows = all_windows(dataset)[:30]
    spec = spec_of(dataset, windows)
    whole, out = tmp_path / "whole", tmp_path / "full"
    write_soft_labels(whole, dataset, spec, windows, Labeller(dataset.vocab_size))
    sizes = [(whole / shard_name(i)).stat().st_size for i in range(3)]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (100, sizes[0] // 2, sizes[0] - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(limit, 1500), old[1]))
            with pytest.raises(OSError, match=r"shard 0 could not be written .*the 0 before it are kept: make room"):
                write_soft_labels(out, dataset, spec, windows, Labeller(dataset.vocab_size))
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            assert not list(out.glob("*labels*"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    write_soft_labels(out, dataset, spec, windows, Labeller(dataset.vocab_size))
    assert content(out) == content(whole)


def test_no_room_for_the_second_shard(build, tmp_path, monkeypatch):
    """The first shard is kept, and the next call goes on behind it."""
    dataset = build()
    windows = all_windows(dataset)[:30]
    spec = spec_of(dataset, windows)
    label = Labeller(dataset.vocab_size)
    real = os.fsync

    def full(descriptor: int) -> None:
        if f".tmp-{shard_name(1)}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"shard 1 could not be written \(No space left on device\); the 1 before it"):
        write_soft_labels(tmp_path / "small", dataset, spec, windows, label, batch_windows=10)
    assert [p.name for p in (tmp_path / "small").glob("*labels*")] == [shard_name(0)]
    monkeypatch.setattr(os, "fsync", real)
    result = write_soft_labels(tmp_path / "small", dataset, spec, windows, label, batch_windows=10)
    assert (result.kept, result.windows) == (1, 19)
    assert label.calls == 7
    assert SoftLabelCache(tmp_path / "small").read(np.array([29])).lse.size == 16
