"""Real processes: kill -9 at a random step, SIGTERM, and what the next process makes of it."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effkern.train.checkpoint import list_checkpoints
from effkern.train.log import read_log
from effkern.train.loop import train
from effkern.train.mapping import flatten
from effkern.train.restore import load_model, weights_digest
from tests.train.fixtures import STEPS, at

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("tokens_per_s", "wall_s")


def curve(out: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(out / "log.jsonl")]


def toml(config, path: Path) -> Path:
    """`config` as a file, section by section."""
    lines: dict[str, list[str]] = {}
    for key, value in flatten(config).items():
        section, _, name = key.rpartition(".")
        text = str(value).lower() if isinstance(value, bool) else repr(value)
        lines.setdefault(section, []).append(f"{name} = {text}")
    path.write_text("\n".join(f"[{section}]\n" + "\n".join(body) for section, body in lines.items()))
    return path


def start(config, folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "effkern", "train", "--config", str(toml(config, folder / "run.toml"))]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    )


def wait_for_steps(process: subprocess.Popen, out: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    log = out / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    train(at(base, out), quiet=True)
    return out


def test_kill_9_and_resume_is_bit_identical(base, undisturbed, tmp_path):
    config = at(base, tmp_path / "run")
    process = start(config, tmp_path)
    # Another step at every run of the test; whatever it is, the curve must be the same.
    wait_for_steps(process, tmp_path / "run", random.SystemRandom().randint(9, 90))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    killed = read_log(tmp_path / "run" / "log.jsonl")[-1]["step"]
    stored = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert stored, killed
    assert killed < STEPS
    result = train(config, quiet=True)
    assert result.finished
    assert curve(tmp_path / "run") == curve(undisturbed)
    assert weights_digest(load_model(tmp_path / "run").model) == weights_digest(load_model(undisturbed).model)


def test_sigterm_saves_says_how_to_go_on_and_resumes_bit_identically(base, undisturbed, tmp_path):
    config = at(base, tmp_path / "run")
    process = start(config, tmp_path)
    wait_for_steps(process, tmp_path / "run", 12)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    last = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r["kind"] == "train"][-1]["step"]
    assert last < STEPS
    assert f"stopped by signal 15 after step {last}; saved. To go on:" in output
    assert f"effkern train --config {tmp_path / 'run.toml'}" in output
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{last:08d}"
    assert train(config, quiet=True).finished
    assert curve(tmp_path / "run") == curve(undisturbed)
