"""What each process does in the tests of the trainer over several processes: short runs in every mode."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import effkern
from effkern.models import Decoder
from effkern.train.config import TrainConfig
from effkern.train.finetune import FineTuner
from effkern.train.log import read_log
from effkern.train.loop import Trainer
from effkern.train.mapping import overlay
from effkern.train.restore import load_model, weights_digest
from tests.faults.bench import file_limit

TIMES = ("tokens_per_s", "wall_s")
STOP = 7
"""Step at which rank 1 of four is asked to stop."""

# How ranks share a run.
DDP = {"distributed__mode": "ddp"}
FSDP = {"distributed__mode": "fsdp"}
HSDP = {"distributed__mode": "hsdp", "distributed__replicas": 2}
VOCAB = {"distributed__mode": "fsdp", "distributed__vocab_parallel": True}


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
    """Curve, digest of the last checkpoint and of the model in memory, and validation after a run."""
    kind, stored = (FineTuner, out / "merged") if config.lora.rank else (Trainer, out)
    trainer = kind(changed(config, run__out=str(out)), quiet=True)
    result = trainer.run()
    digest = weights_digest(load_model(stored).model)
    return {"curve": curve(out), "digest": digest, "live": in_memory(trainer), "evals": result.evals}


def in_memory(trainer: Trainer) -> str:
    """Digest of the whole weights, put together from the parts of the ranks."""
    if trainer.config.lora.rank:
        return ""
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in trainer.model.state_dict().items()}
    whole = Decoder(trainer.config.model)
    whole.load_state_dict(state)
    return weights_digest(whole)


def refusal(function: Callable[[], Any]) -> str:
    """What it says when it refuses."""
    try:
        function()
    except (ValueError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def stopped(config: TrainConfig, out: Path) -> int | None:
    """Rank 1 alone is asked to stop after STOP steps; the signal that this rank has heard of."""
    trainer = Trainer(changed(config, run__out=str(out)), quiet=True)
    heard = trainer.parallel.stop
    trainer.parallel.stop = lambda signum: heard(  # type: ignore[method-assign]
        15 if (dist.get_rank(), trainer.state.step) == (1, STOP) else signum
    )
    return trainer.run().signum


def refusals(config: TrainConfig, rank: int, out: Path) -> dict[str, str]:
    """What every rank says where ranks or settings do not fit."""

    def start(settings: TrainConfig) -> str:
        return refusal(lambda: Trainer(changed(settings, run__out=str(out)), quiet=True).run())

    found = {
        "config": start(changed(config, data__seed=rank)),
        "batch": start(changed(config, data__batch_size=5)),
        "data": start(changed(config, data__path=config.data.path if rank == 0 else str(out / "none"))),
        "replicas": start(changed(config, distributed__mode="hsdp", distributed__replicas=3)),
    }
    version = effkern.__version__
    effkern.__version__ = f"{version}.dev{rank}"
    found["version"] = start(config)
    effkern.__version__ = version
    return found


class Sent(TorchDispatchMode):
    """Bytes that a rank sends in rings, by kind of collective; all-reduces of a few numbers are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {"gather": 0.0, "scatter": 0.0, "all-reduce": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, share = str(func), (dist.get_world_size() - 1) / dist.get_world_size()
        if func.namespace == "c10d" and "allgather" in name:
            self.bytes["gather"] += share * size_of(args[0])
        elif func.namespace == "c10d" and "reduce_scatter" in name:
            self.bytes["scatter"] += share * size_of(args[1])
        elif func.namespace == "c10d" and "allreduce" in name and size_of(args[0]) > 64:
            self.bytes["all-reduce"] += 2 * share * size_of(args[0])
        return func(*args, **(kwargs or {}))


def size_of(tensors: Any) -> int:
    """Bytes of a tensor, or of lists of them."""
    if isinstance(tensors, (list, tuple)):
        return sum(map(size_of, tensors))
    return tensors.numel() * tensors.element_size()


def measured(config: TrainConfig, out: Path) -> dict[str, Any]:
    """What the second step of a run sends, and the bytes of weights and state that this rank holds after it."""
    trainer = Trainer(changed(config, run__out=str(out)), quiet=True)
    out.mkdir(parents=True, exist_ok=True)
    trainer._begin()
    trainer.step(0)
    with Sent() as sent:
        trainer.step(1)
    weights = [p.to_local() for p in trainer.model.parameters()]
    state = [t for of in trainer.optimizer.state.values() for name, t in of.items() if name != "step"]
    return {**sent.bytes, "weights": size_of(weights), "optimizer": size_of([t.to_local() for t in state])}


def full_disk(config: TrainConfig, rank: int, out: Path) -> dict[str, Any]:
    """Rank 1 alone has no room for its part of the second checkpoint."""
    trainer = Trainer(changed(config, run__out=str(out), run__checkpoint_every=2), quiet=True)
    save = trainer.save

    def no_room() -> Path:
        with file_limit(1024) if (rank, trainer.state.step) == (1, 4) else nullcontext():
            return save()

    trainer.save = no_room  # type: ignore[method-assign]
    told = refusal(trainer.run)
    return {"told": told, "left": sorted(path.name for path in (out / "checkpoints").iterdir())}


def work(rank: int, world: int, plans: dict[int, dict[str, Any]], folder: Path) -> dict[int, Any]:
    """What `plans` say for four processes and then, in a new group of the first two, for two: starting processes takes
    longer than all they do."""
    found: dict[int, Any] = {4: carry_out(plans[4], rank, folder / "4")}
    dist.barrier()
    if rank == 0:
        for name in ("2", "1"):
            shutil.copytree(folder / "4" / "resharded", folder / name / "resharded")
    dist.destroy_process_group()
    pair = rank < 2
    place = f"file://{folder}/meet-{0 if pair else rank}"
    dist.init_process_group("gloo", init_method=place, rank=rank if pair else 0, world_size=2 if pair else 1)
    if pair:
        found[2] = carry_out(plans[2], rank, folder / "2")
    return found


def carry_out(plan: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """`plan`: "runs" {name: (config, settings)}, "measure" {name: config}, and configs to "stop", "full", "refuse"."""
    found: dict[str, Any] = {}
    for name, (config, settings) in plan["runs"].items():
        found[name] = run(changed(config, **settings), folder / name)
    for name, config in plan.get("measure", {}).items():
        found[name] = measured(config, folder / name)
    if "stop" in plan:
        found["signum"] = stopped(plan["stop"], folder / "resharded")
    if "full" in plan:
        found["full"] = full_disk(plan["full"], rank, folder / "full")
    if "refuse" in plan:
        found["refusals"] = refusals(plan["refuse"], rank, folder / "refused")
    return found
