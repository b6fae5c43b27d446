"""Runs of the trainer in processes of their own, and what is left of them."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from effkern.data import build_dataset
from effkern.models import DecoderConfig
from effkern.train.config import DataConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from effkern.train.log import read_log
from effkern.train.mapping import flatten, overlay
from effkern.train.restore import load_model, weights_digest

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("tokens_per_s", "wall_s")
WORDS = ("alpha", "beta", "gamma", "delta", "return", "value", "list", "of", "the", "first", "second", "item")
PATIENCE = 180.0
"""Seconds after which a process that should end counts as hung."""


def small_config(folder: Path, steps: int) -> TrainConfig:
    """A corpus of made-up sentences under `folder`, and a decoder so small that a step takes milliseconds."""
    rng, text = random.Random(0), folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        for i in range(40):
            lines = [" ".join(rng.choices(WORDS, k=8)) for _ in range(40)]
            (text / f"{i}.txt").write_text("\n".join(lines))
        build_dataset(folder / "data", [text], vocab_size=300, val_fraction=0.2)
    return TrainConfig(
        model=DecoderConfig(
            vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_size=24, max_seq_len=32
        ),
        data=DataConfig(path=str(folder / "data"), seq_len=16, batch_size=4),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5),
        schedule=ScheduleConfig(steps=steps),
        run=RunConfig(
            out="", device="cpu", precision="fp32", threads=1, eval_every=40, eval_tokens=256, checkpoint_every=7,
            keep_last=3, tensorboard=False, plot=False,
        ),
    )  # fmt: skip


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """`config` with fields given as section__field."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, field = name.split("__")
        sections.setdefault(section, {})[field] = value
    return overlay(config, sections)


def outcome(out: Path) -> tuple[str, list[dict[str, Any]]]:
    """Bits of the weights and the whole log without what depends on the clock: equal for equal runs."""
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(out / "log.jsonl")]
    return weights_digest(load_model(out).model), records


def steps_done(out: Path) -> int:
    """Completed steps in the log."""
    return max((record["step"] for record in read_log(out / "log.jsonl")), default=0)


def write_toml(config: TrainConfig, path: Path) -> Path:
    """`config` as a file, section by section."""
    lines: dict[str, list[str]] = {}
    for key, value in flatten(config).items():
        section, _, name = key.rpartition(".")
        text = str(value).lower() if isinstance(value, bool) else repr(value)
        lines.setdefault(section, []).append(f"{name} = {text}")
    path.write_text("\n".join(f"[{section}]\n" + "\n".join(body) for section, body in lines.items()))
    return path


class Run:
    """The processes of one run: one, or ranks that find each other as torchrun's do, but with nobody to end them."""

    def __init__(self, config: TrainConfig) -> None:
        out = Path(config.run.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        file = write_toml(config, out.with_suffix(".toml"))
        world = 1 if config.distributed.mode == "none" else 2
        command = [sys.executable, "-m", "effkern", "train", "--config", str(file)]
        common = _environment()
        if world > 1:
            common |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.out, self.logs = out, [out.with_suffix(f".{rank}.txt") for rank in range(world)]
        self.before = _file_number(out)
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else common
            with log.open("w") as stream:
                process = subprocess.Popen(command, env=own, stdout=stream, stderr=subprocess.STDOUT, cwd=out.parent)
            self.processes.append(process)

    @property
    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def wait_for(self, step: int) -> bool:
        """Until the log has this step, of these processes; False if the run ended before."""
        end = time.monotonic() + PATIENCE
        while _file_number(self.out) == self.before or steps_done(self.out) < step:
            if not self.running:
                return False
            assert time.monotonic() < end, self.output()
            time.sleep(0.005)
        return True

    def send(self, signum: int, ranks: list[int]) -> None:
        """Send a signal to some ranks."""
        for rank in ranks:
            if self.processes[rank].poll() is None:
                self.processes[rank].send_signal(signum)

    def wait(self) -> list[int]:
        """Exit statuses. A rank that is left waiting for another one is a failure."""
        end = time.monotonic() + PATIENCE
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a process has hung:\n{self.output()}") from None
        finally:
            self.send(signal.SIGKILL, list(range(len(self.processes))))

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


class Torchrun(Run):
    """The same under torchrun, which starts the ranks again when one of them dies."""

    def __init__(self, config: TrainConfig) -> None:
        out = Path(config.run.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["--max-restarts=3", "-m", "effkern", "train", "--config"]
        command += [str(write_toml(config, out.with_suffix(".toml")))]
        self.out, self.logs, self.before = out, [out.with_suffix(".txt")], _file_number(out)
        with self.logs[0].open("w") as stream:
            self.processes = [
                subprocess.Popen(command, env=_environment(), stdout=stream, stderr=subprocess.STDOUT, cwd=out.parent)
            ]

    def ranks(self) -> list[psutil.Process]:
        """The processes that torchrun has started."""
        children = psutil.Process(self.processes[0].pid).children(recursive=True)
        return [child for child in children if "effkern" in child.cmdline()]


def _file_number(out: Path) -> int:
    """Of the log, which a run that goes on replaces by a shorter one; 0: there is none."""
    log = out / "log.jsonl"
    return log.stat().st_ino if log.exists() else 0


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
