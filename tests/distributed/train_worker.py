"""What each process does in the tests of the trainer over several processes: short runs in every mode."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

import effkern
from effkern.train.config import TrainConfig
from effkern.train.log import read_log
from effkern.train.loop import Trainer
from effkern.train.mapping import overlay
from effkern.train.restore import load_model, weights_digest

TIMES = ("tokens_per_s", "wall_s")


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """`config` with fields given as section__field."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, field = name.split("__")
        sections.setdefault(section, {})[field] = value
    return overlay(config, sections)


def curve(out: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(out / "log.jsonl")]


def run(config: TrainConfig, out: Path) -> dict[str, Any]:
    """Curve, digest of the last checkpoint and step after a run; the same on every rank."""
    result = Trainer(changed(config, run__out=str(out)), quiet=True).run()
    return {
        "curve": curve(out),
        "digest": weights_digest(load_model(out).model),
        "step": result.state.step,
        "evals": result.evals,
    }


def until(config: TrainConfig, out: Path, steps: int) -> int:
    """Run, and ask rank 1 alone for a stop once `steps` steps are done; the step that was saved."""
    trainer = Trainer(changed(config, run__out=str(out)), quiet=True)
    real = trainer.parallel.stop

    def stop(signum: int | None) -> int | None:
        return real(15 if trainer.state.step == steps and dist.get_rank() == 1 else signum)

    trainer.parallel.stop = stop  # type: ignore[method-assign]
    result = trainer.run()
    assert result.signum == 15
    return result.state.step


def refusal(function: Callable[[], Any]) -> str:
    """What it says when it refuses."""
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sharing(mode: str, world: int) -> dict[str, Any]:
    """Settings of one mode by name."""
    return {
        "ddp": {"distributed__mode": "ddp"},
        "fsdp": {"distributed__mode": "fsdp"},
        "hsdp": {"distributed__mode": "hsdp", "distributed__replicas": 2},
        "vocab": {"distributed__mode": "fsdp", "distributed__vocab_parallel": True},
    }[mode]


def work(rank: int, world: int, configs: Path, folder: Path) -> dict[str, Any]:
    cases: dict[str, tuple[str, TrainConfig]] = pickle.loads((configs / f"{world}.pkl").read_bytes())
    found: dict[str, Any] = {}
    for name, (mode, config) in cases.items():
        found[name] = run(changed(config, **sharing(mode, world)), folder / name.replace(" ", "-"))
    config = changed(cases["vocab"][1], **sharing("vocab", world))
    if world == 4:
        found["stopped at"] = until(config, folder / "stopped", 7)
        return found
    other = changed(config, data__seed=1) if rank else config
    found["another config"] = refusal(lambda: Trainer(changed(other, run__out=str(folder / "no")), quiet=True))
    version = effkern.__version__
    effkern.__version__ = f"{version}.dev{rank}"
    found["another version"] = refusal(lambda: Trainer(changed(config, run__out=str(folder / "no")), quiet=True))
    effkern.__version__ = version
    odd = changed(config, data__batch_size=5, run__out=str(folder / "no"))
    found["odd batch"] = refusal(lambda: Trainer(odd, quiet=True))
    return found
