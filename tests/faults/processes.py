"""Faults of whole processes: they are killed, or asked to end."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effkern.train.checkpoint import list_checkpoints, read_meta
from effkern.train.config import TrainConfig
from tests.faults.bench import Bench, Found
from tests.faults.runs import Run, Torchrun, changed, outcome, steps_done

# A rank whose peer dies before they have met waits for it this long; torchrun would end it at once.
RANKS = {"distributed__mode": "ddp", "distributed__timeout_s": 20}
SHARDED = {"distributed__mode": "fsdp", "distributed__timeout_s": 20}


def in_processes(bench: Bench, config: TrainConfig) -> Any:
    """The outcome of a run left alone in processes of its own."""

    def make() -> Any:
        run = Run(bench.fresh(config))
        assert run.wait() == [0] * len(run.processes), run.output()
        return outcome(run.out)

    return bench.undisturbed(config.distributed.mode, make)


def kills(bench: Bench, trials: int, mode: dict[str, Any], everyone: bool) -> Found:
    """kill -9 at random moments, start-up included, of one rank or of all; the run is started again until it ends."""
    config, found = changed(bench.config, **mode), Found("")
    wanted = in_processes(bench, config)
    own = bench.fresh(config)
    while found.trials < trials:
        before = _newest_step(own)
        run = Run(own)
        # Most of a start is imports: some moments are drawn from it, most from the steps behind it.
        if bench.rng.random() < 0.15:
            time.sleep(bench.rng.uniform(0, 4))
        elif run.wait_for(before + 1):
            time.sleep(bench.rng.uniform(0, 0.6))
        if run.running:
            ranks = list(range(len(run.processes)))
            run.send(signal.SIGKILL, ranks if everyone else [bench.rng.choice(ranks)])
            codes = run.wait()
            assert -signal.SIGKILL in codes, (codes, run.output())
            found.trials += 1
            found.steps_repeated += max(0, steps_done(run.out) - _newest_step(own))
        else:
            assert run.wait() == [0] * len(run.processes), run.output()
        if steps_done(run.out) == config.schedule.steps or found.trials == trials:
            last = Run(own)
            assert last.wait() == [0] * len(last.processes), last.output()
            assert outcome(last.out) == wanted, "a killed and resumed run differs from the one left alone"
            found.exact = found.trials
            own = bench.fresh(config)
    return found


def _newest_step(config: TrainConfig) -> int:
    stored = list_checkpoints(Path(config.run.out) / "checkpoints")
    return read_meta(stored[-1])["step"] if stored else 0


def kill_one_rank(bench: Bench, trials: int) -> Found:
    return kills(bench, trials, RANKS, everyone=False)


def kill_all_ranks(bench: Bench, trials: int) -> Found:
    return kills(bench, trials, SHARDED, everyone=True)


def kill_under_torchrun(bench: Bench, trials: int) -> Found:
    """kill -9 of one rank of torchrun --max-restarts: the ranks are started again, and go on, by themselves."""
    config, found = changed(bench.config, **SHARDED), Found("")
    wanted = in_processes(bench, config)
    for _ in range(trials):
        run = Torchrun(bench.fresh(config))
        assert run.wait_for(bench.rng.randint(9, config.schedule.steps // 2)), run.output()
        before, ranks = steps_done(run.out), run.ranks()
        assert len(ranks) == 2, run.output()
        bench.rng.choice(ranks).kill()
        assert run.wait() == [0], run.output()
        found.detected += "resumed" in run.output()
        found.steps_repeated += before % config.run.checkpoint_every
        found.trials += 1
        found.exact += outcome(run.out) == wanted
    return found


def sigterm(bench: Bench, trials: int) -> Found:
    """SIGTERM to one rank: all save at the same step and end with 128 + 15 well within a grace period of 30 s."""
    config, found = changed(bench.config, **SHARDED), Found("")
    wanted = in_processes(bench, config)
    for _ in range(trials):
        run = Run(bench.fresh(config))
        assert run.wait_for(bench.rng.randint(2, config.schedule.steps // 2)), run.output()
        start = time.monotonic()
        run.send(signal.SIGTERM, [bench.rng.choice([0, 1])])
        assert run.wait() == [128 + signal.SIGTERM] * 2, run.output()
        assert time.monotonic() - start < 30
        done = steps_done(run.out)
        found.detected += f"stopped by signal 15 after step {done}; saved" in run.output()
        stored = list_checkpoints(run.out / "checkpoints")[-1]
        found.steps_repeated += done - read_meta(stored)["step"]
        again = Run(changed(config, run__out=str(run.out)))
        assert again.wait() == [0, 0], again.output()
        found.trials += 1
        found.exact += outcome(run.out) == wanted
    return found


CASES: dict[str, Callable[[Bench, int], Found]] = {
    "kill -9 of one rank": kill_one_rank,
    "kill -9 of all ranks": kill_all_ranks,
    "kill -9 under torchrun": kill_under_torchrun,
    "SIGTERM to one rank": sigterm,
}
