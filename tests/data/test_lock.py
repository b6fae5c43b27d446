"""One writer at a time: a second is refused and told who the first is; a killed one blocks nobody."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from effkern.data.curation.artifact import LOCK, begin, finish, open_artifact
from effkern.data.lock import FileLock, holder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the lock needs fcntl")

STEP = ("embeddings", {"seed": 0}, {"source": "a"})
# Begins a step, writes one part, and waits to be killed.
WRITER = """
import sys
import numpy as np
from effkern.data.curation.artifact import begin, write_array
with begin(sys.argv[1], "embeddings", {"seed": 0}, {"source": "a"}, False) as folder:
    write_array(folder / ".part-000000.npy", np.arange(3))
    print("begun", flush=True)
    input()
"""


@pytest.fixture
def writer(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_and_a_killed_one_blocks_nobody(writer, tmp_path):
    out = tmp_path / "out"
    for overwrite in (False, True):
        message = rf"^embeddings: another process is writing to .*out \(process {writer.pid} on .*: -c .*out\)$"
        with pytest.raises(RuntimeError, match=message), begin(out, *STEP, overwrite):
            pass
    assert (out / ".part-000000.npy").exists()
    writer.kill()
    writer.communicate()
    with begin(out, *STEP, False) as folder:
        # What the killed one has done is taken up.
        assert np.load(folder / ".part-000000.npy").tolist() == [0, 1, 2]
        assert holder(folder / LOCK).startswith("process ")
        finish(folder, *STEP, {"embeddings": np.arange(3)})
    assert holder(out / LOCK) is None
    assert open_artifact(out, "embeddings").load("embeddings").tolist() == [0, 1, 2]
    assert {file.name for file in out.iterdir()} == {LOCK, "curation.json", "embeddings.npy"}


def test_a_folder_of_somebody_else_gets_no_lock(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="must be empty or hold a step"), begin(tmp_path, *STEP, True):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_lock_falls_with_an_error_and_not_by_looking_at_it(tmp_path):
    path = tmp_path / "lock"
    assert holder(path) is None

    def fail():
        with FileLock(path, RuntimeError):
            assert holder(path).startswith(f"process {os.getpid()} on ")
            with pytest.raises(RuntimeError, match=r"^process \d+ on "), FileLock(path, RuntimeError):
                pass
            raise KeyError(holder(path))

    with pytest.raises(KeyError, match=r"process \d+ on "):
        fail()
    assert holder(path) is None
    with FileLock(path, RuntimeError):
        assert holder(path) is not None


def test_any_command_line_is_told_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    # As the system gives names that are not UTF-8.
    monkeypatch.setattr(sys, "argv", ["effkern", "train", "\udcff.toml", "two\nlines\x1b[2J"])
    with FileLock(path, RuntimeError), pytest.raises(RuntimeError, match="process") as refused:
        FileLock(path, RuntimeError).__enter__()
    assert str(refused.value).endswith(r": effkern train '\udcff.toml' 'two lines [2J'")
    path.write_bytes(b"\x00\xff")
    with path.open() as held:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX)
        assert holder(path) == "\ufffd"


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    path = tmp_path / "lock"

    def fail_with(number):
        def fail(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", fail)

    for number in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
        fail_with(number)
        with FileLock(path, RuntimeError), FileLock(path, RuntimeError):
            assert holder(path) is None
    fail_with(errno.EIO)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with pytest.raises(OSError, match="Input/output error"), FileLock(path, RuntimeError):
        pass
    assert before is None or len(os.listdir("/proc/self/fd")) == before
