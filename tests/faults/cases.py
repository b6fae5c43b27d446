"""What can happen to a run. Each case does it `trials` times and counts what was lost: nothing may be.

A trial is exact if log and weights of the run that was disturbed and resumed are, bit for bit, those of the same run
left alone.
"""

import copy
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist

from effkern.train.checkpoint import CheckpointError, list_checkpoints, read_meta
from effkern.train.config import TrainConfig
from effkern.train.log import read_log
from effkern.train.loop import Trainer, train
from effkern.train.soft_labels import LabelOptions, SoftLabelJob
from tests.faults import processes
from tests.faults.bench import Bench, Found, file_limit
from tests.faults.processes import SHARDED
from tests.faults.runs import changed, outcome


def disk_full(bench: Bench, trials: int) -> Found:
    """No file may grow beyond a limit (RLIMIT_FSIZE) from a random checkpoint on: the run ends with an error, keeps
    what it had, and goes on when there is room."""
    found, wanted = Found(""), bench.alone(bench.config)
    for _ in range(trials):
        config = bench.fresh(bench.config)
        trainer = Trainer(config, quiet=True)
        good = bench.rng.randint(1, 4)
        real = trainer.save

        def save(trainer: Trainer = trainer, good: int = good, real: Callable[[], Path] = real) -> Path:
            if trainer.state.step // trainer.config.run.checkpoint_every > good:
                with file_limit(4096):
                    return real()
            return real()

        trainer.save = save  # type: ignore[method-assign]
        try:
            trainer.run()
        except CheckpointError as error:
            newest = list_checkpoints(Path(config.run.out) / "checkpoints")[-1]
            found.detected += "could not be written" in str(error) and str(newest) in str(error)
            found.steps_repeated += trainer.state.step - read_meta(newest)["step"]
        train(config, quiet=True)
        found.trials += 1
        found.exact += outcome(Path(config.run.out)) == wanted
    return found


def damage(path: Path, rng: random.Random) -> None:
    """Cut the file at a random place, or flip one random bit of it."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        content = content[:place]
    else:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _stopped(bench: Bench, config: TrainConfig) -> TrainConfig:
    """A run that was stopped at a random step."""
    own = bench.fresh(config)
    trainer, last = Trainer(own, quiet=True), bench.rng.randint(15, config.schedule.steps - 2)
    trainer.parallel = stop_at(trainer, last)
    trainer.run()
    return own


def stop_at(trainer: Trainer, step: int) -> Any:
    """The trainer's ranks, of which one gets SIGTERM after `step` steps."""
    parallel = copy.copy(trainer.parallel)
    parallel.stop = lambda signum: signal.SIGTERM if trainer.state.step == step else signum  # type: ignore[method-assign]
    return parallel


def damaged_checkpoint(bench: Bench, trials: int) -> Found:
    """A file of the newest checkpoint is cut or has a bit flipped: it is named, set aside, the one before is taken."""
    found, wanted = Found(""), bench.alone(bench.config)
    for _ in range(trials):
        config = _stopped(bench, bench.config)
        out = Path(config.run.out)
        newest = list_checkpoints(out / "checkpoints")[-1]
        file = bench.rng.choice(sorted(newest.iterdir()))
        damage(file, bench.rng)
        found.steps_repeated += _step_of(newest) - _step_of(list_checkpoints(out / "checkpoints")[-2])
        trainer = Trainer(config, quiet=True)
        trainer.run()
        found.detected += any(newest.name in note and file.name in note for note in trainer._notes)
        assert (out / "checkpoints" / f"damaged-{newest.name}").is_dir()
        found.trials += 1
        found.exact += outcome(out) == wanted
    return found


def damaged_shards_of_checkpoint(bench: Bench, trials: int) -> Found:
    """The same for a checkpoint in shards; one rank, which hashes and reads them as many do."""
    config = changed(bench.config, **SHARDED)
    dist.init_process_group("gloo", init_method=f"file://{bench.folder}/meet", rank=0, world_size=1)
    try:
        return damaged_checkpoint(Bench(bench.folder / "shards", config, bench.rng.randrange(1000)), trials)
    finally:
        dist.destroy_process_group()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def damaged_shard(bench: Bench, trials: int) -> Found:
    """A shard of the data is damaged between two starts: the run is refused, naming it, and goes on with the right
    one."""
    data = bench.folder / "own-data"
    shutil.copytree(bench.config.data.path, data)
    config = changed(bench.config, data__path=str(data))
    wanted = bench.alone(bench.config)
    return _damaged_inputs(bench, trials, config, sorted(data.glob("*.bin")) or _files(data), wanted)


def damaged_cache(bench: Bench, trials: int) -> Found:
    """The same for a cache of soft labels."""
    teacher = bench.fresh(changed(bench.config, schedule__steps=10))
    train(teacher, quiet=True)
    cache, steps = bench.folder / "labels", bench.config.schedule.steps
    options = LabelOptions(
        device="cpu", precision="fp32", batch_windows=64, method="topk", k=4, steps=steps, batch_size=4
    )
    SoftLabelJob(teacher.run.out, bench.config.data.path, options).write(cache)
    config = changed(bench.config, schedule__mode="rkd", schedule__omega=0.5, teacher__cache=str(cache))
    return _damaged_inputs(bench, trials, config, _files(cache), bench.alone(config))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.suffix != ".json")


def _damaged_inputs(bench: Bench, trials: int, config: TrainConfig, files: list[Path], wanted: Any) -> Found:
    found = Found("")
    for _ in range(trials):
        own = _stopped(bench, config)
        file = bench.rng.choice(files)
        content = file.read_bytes()
        damage(file, bench.rng)
        before = list_checkpoints(Path(own.run.out) / "checkpoints")
        try:
            train(own, quiet=True)
        except ValueError as error:
            found.detected += str(file) in str(error)
        assert list_checkpoints(Path(own.run.out) / "checkpoints") == before
        file.write_bytes(content)
        train(own, quiet=True)
        found.trials += 1
        found.exact += outcome(Path(own.run.out)) == wanted
    return found


def nan_gradient(bench: Bench, trials: int) -> Found:
    """One number of one gradient is NaN at a random step: no weight is touched, and the run, stopped and resumed, is
    the one that was not stopped."""
    found = Found("")
    for _ in range(trials):
        at = bench.rng.randrange(2, bench.config.schedule.steps - 5)
        outcomes = []
        for stop in (False, True):
            config = bench.fresh(bench.config)
            skipped = 0
            for last in (bench.rng.randint(at + 1, at + 3), None) if stop else (None,):
                trainer = Trainer(config, quiet=True)
                if last is not None:
                    trainer.parallel = stop_at(trainer, last)
                with nan_at(trainer, at):
                    skipped = trainer.run().state.skipped
            outcomes.append(outcome(Path(config.run.out)))
        found.detected += skipped == 1
        found.trials += 1
        found.exact += outcomes[0] == outcomes[1]
    return found


@contextmanager
def nan_at(trainer: Trainer, step: int) -> Iterator[None]:
    """The last entry of the embedding's gradient is NaN in `step`; its weights must come out of it as they were."""
    real, weight = trainer.step, trainer.model.embedding.weight

    def poison(grad: torch.Tensor) -> torch.Tensor:
        return grad.clone().index_put_((torch.tensor(-1), torch.tensor(-1)), torch.tensor(torch.nan))

    def poisoned(number: int) -> Any:
        if number != step:
            return real(number)
        handle, before = weight.register_hook(poison), [p.detach().clone() for p in trainer.model.parameters()]
        found = real(number)
        handle.remove()
        assert not found[0].applied
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
        return found

    with mock.patch.object(trainer, "step", poisoned):
        yield


def data_worker(bench: Bench, trials: int) -> Found:
    """kill -9 of a process that reads batches ahead: another one is started from the step that is missing."""
    # Of 17 KB each: the pipe is full, with a part of one, and never holds the rest of the run.
    large = changed(bench.config, data__batch_size=128)
    found, wanted = Found(""), bench.alone(large)
    for _ in range(trials):
        config = bench.fresh(changed(large, data__workers=1))
        trainer, at = Trainer(config, quiet=True), bench.rng.randrange(2, large.schedule.steps - 10)
        notes: list[str] = []
        real = trainer.step

        def step(
            number: int, trainer: Trainer = trainer, at: int = at, real: Any = real, notes: list[str] = notes
        ) -> Any:
            trainer.feed.note = notes.append
            if number == at:
                for child in psutil.Process().children():
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.kill()
            return real(number)

        with mock.patch.object(trainer, "step", step):
            # A SIGTERM from outside, as of a time limit, would save and end it like any run.
            assert trainer.run().signum is None, "the run was asked to stop"
        found.detected += any("data workers started again" in note for note in notes)
        found.trials += 1
        found.exact += outcome(Path(config.run.out)) == wanted
    return found


def clock_jumps(bench: Bench, trials: int) -> Found:
    """The system's clock jumps by up to thirty years at every reading of it, through a stop and a resume."""
    found, wanted = Found(""), bench.alone(bench.config)
    real, real_ns = time.time, time.time_ns

    def jump() -> int:
        return bench.rng.randint(-(10**9), 3 * 10**8)

    for _ in range(trials):
        with (
            mock.patch("time.time", side_effect=lambda: real() + jump()),
            mock.patch("time.time_ns", side_effect=lambda: real_ns() + 10**9 * jump()),
        ):
            config = _stopped(bench, bench.config)
            result = train(config, quiet=True)
        walls = [r["wall_s"] for r in _train_records(Path(config.run.out))]
        found.trials += 1
        found.detected += walls == sorted(walls) and walls[0] >= 0 and result.state.wall_s < 3600
        found.exact += outcome(Path(config.run.out)) == wanted
    return found


def _train_records(out: Path) -> list[dict[str, Any]]:
    return [record for record in read_log(out / "log.jsonl") if record["kind"] == "train"]


CASES: dict[str, Callable[[Bench, int], Found]] = {
    **processes.CASES,
    "disk full": disk_full,
    "checkpoint damaged": damaged_checkpoint,
    "sharded checkpoint damaged": damaged_shards_of_checkpoint,
    "data shard damaged": damaged_shard,
    "label cache damaged": damaged_cache,
    "NaN in a gradient": nan_gradient,
    "data worker killed": data_worker,
    "clock jumps": clock_jumps,
}


def run_case(name: str, bench: Bench, trials: int) -> Found:
    """One case by its name in CASES."""
    start = time.monotonic()
    found = CASES[name](bench, trials)
    found.case, found.seconds = name, round(time.monotonic() - start, 1)
    return found
