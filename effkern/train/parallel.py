"""How processes share a run: one interface, of a single process (`Alone`) or of torchrun's ranks (`Ranks`).

The global batch is the same whatever the number of ranks; each computes its rows of it. All engines are torch's:
DistributedDataParallel, fully_shard (FSDP2), a two-dimensional DeviceMesh for HSDP.
"""

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from effkern.distributed import global_count
from effkern.models import Decoder
from effkern.models.decoder import LoopOutputs
from effkern.train.config import TrainConfig

Found = TypeVar("Found")
IGNORE = -100
"""Label of a token that does not count."""


class Alone:
    """A single process: nothing is wrapped, summed or waited for."""

    rank, world, is_main = 0, 1, True
    root_group: Any = None
    """Processes that hold the same factors of Shampoo and may share its roots."""
    spread_loss: Callable[..., Any] | None = None
    """linear_distill_loss over an output layer in slices, where it is spread."""
    sharded = False
    """Parameters are DTensors, and checkpoints are written by all ranks."""

    def wrap(self, model: Decoder) -> Any:
        """The forward pass to train with; with FSDP, `model` itself is changed. Before the optimizer is made."""
        return model

    def loop_outputs(self, model: Decoder, forward: Any) -> Callable[..., LoopOutputs]:
        """model.loop_outputs, to train with; `forward` is what `wrap` returned."""
        return model.loop_outputs

    def shard_teacher(self, teacher: Decoder) -> None:
        """Spread a frozen teacher as the student is spread."""

    def denominator(self, labels: Tensor) -> Any:
        """What the loss of a step is divided by, so that gradients come out as means over the whole batch."""
        return int((labels != IGNORE).sum())

    def tokens(self, denom: Any) -> int:
        """Supervised tokens of the whole batch, from its denominator."""
        return denom

    def accumulate(self, forward: Any, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: gradients are reduced after the last one alone."""
        return nullcontext()

    def total(self, sums: Tensor) -> Tensor:
        """Sums of losses and statistics over all ranks."""
        return sums

    def add(self, sums: Tensor) -> Tensor:
        """Sum over all ranks, of anything."""
        return sums

    def clip(self, model: nn.Module, limit: float) -> Tensor:
        """Clip the gradient's norm to `limit`; returns what it was."""
        return nn.utils.clip_grad_norm_(model.parameters(), limit)

    def stop(self, signum: int | None) -> int | None:
        """The signal that any rank has got."""
        return signum

    def share(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
        """This rank's part of `batches`, each with the number of its rows that count."""
        for batch in batches:
            yield batch, len(batch)

    def together(self, function: Callable[[], Found]) -> Found:
        """Call it on every rank; where it raises on one, it raises on all, so that none waits for another."""
        return function()

    def on_main(self, function: Callable[[], Found]) -> Found:
        """Call it on rank 0 alone; every rank gets what it returned or raised."""
        return function()

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, by rank."""
        return [value]

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raise ValueError on every rank unless all have the same `facts`."""

    def lost(self, error: RuntimeError, where: str) -> RuntimeError | None:
        """What to raise in place of `error` where it says that another process has died."""
        return None

    def close(self) -> None:
        """Leave the group, if it was joined here."""


ALONE = Alone()


class Ranks(Alone):
    """The ranks of a process group; joins torchrun's unless there is one."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config.distributed, device
        self._joined = not dist.is_initialized()
        if self._joined:
            missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if missing:
                raise ValueError(
                    f"distributed.mode={self.config.mode!r} must be started by torchrun, got no {missing[0]} "
                    f"(torchrun --nproc-per-node=N -m effkern train ...)"
                )
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            timeout = timedelta(seconds=self.config.timeout_s)
            store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
            # torchrun's store outlives its ranks: those that are started again must not find the addresses of the dead.
            own = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=timeout)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.root_group = dist.group.WORLD
        self.sharded = self.config.mode in ("fsdp", "hsdp")
        size = config.data.batch_size
        if size % self.world:
            raise ValueError(f"data.batch_size must be a multiple of the {self.world} processes, got {size}")
        if self.world % self.config.replicas:
            raise ValueError(f"distributed.replicas must divide the {self.world} processes, got {self.config.replicas}")
        self.mesh = self._mesh() if self.sharded else None
        if self.config.vocab_parallel:
            from effkern.train.sharding import vocab_parallel_loss

            self.spread_loss = vocab_parallel_loss

    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        if self.config.mode == "hsdp":
            shape = (self.config.replicas, self.world // self.config.replicas)
            return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicas", "shards"))
        return init_device_mesh(self.device.type, (self.world,), mesh_dim_names=("shards",))

    def wrap(self, model: Decoder) -> Any:
        if self.sharded:
            from effkern.train.sharding import shard

            shard(model, self.mesh, self.config)
            return model
        from torch.nn.parallel import DistributedDataParallel

        # Parameters are a function of (config, seed), and a resumed run has read them: there is nothing to send.
        trained = LoopOutputsOf(model) if model.config.loop.exit_gate else model
        return DistributedDataParallel(trained, init_sync=False, gradient_as_bucket_view=True)

    def loop_outputs(self, model: Decoder, forward: Any) -> Callable[..., LoopOutputs]:
        return model.loop_outputs if self.sharded else forward

    def shard_teacher(self, teacher: Decoder) -> None:
        if self.sharded:
            from effkern.train.sharding import shard

            shard(teacher, self.mesh, self.config, head=False)

    def denominator(self, labels: Tensor) -> Any:
        # The loss over a spread vocabulary is that of all tokens; others are averaged over the ranks.
        return global_count(labels, averaged=not self.config.vocab_parallel)

    def tokens(self, denom: Any) -> int:
        return round(float(denom) * (1 if self.config.vocab_parallel else self.world))

    def accumulate(self, forward: Any, last: bool) -> AbstractContextManager[Any]:
        if self.sharded:
            forward.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else forward.no_sync()

    def total(self, sums: Tensor) -> Tensor:
        return sums if self.config.vocab_parallel else self.add(sums)

    def add(self, sums: Tensor) -> Tensor:
        dist.all_reduce(sums)
        return sums

    def clip(self, model: nn.Module, limit: float) -> Tensor:
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.sharded:
            norm = norm.full_tensor()  # type: ignore[attr-defined]
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def stop(self, signum: int | None) -> int | None:
        found = torch.tensor(signum or 0, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found) or None

    def share(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
        """Every rank gets as many batches of as many rows, as their collectives must meet; what is lacking is filled
        up with rows that do not count."""
        turn: list[np.ndarray] = []
        first: np.ndarray | None = None
        for batch in batches:
            first = batch if first is None else first
            turn.append(batch)
            if len(turn) == self.world:
                yield _fill(turn[self.rank], first)
                turn = []
        if turn and first is not None:
            yield _fill(turn[self.rank] if self.rank < len(turn) else first[:0], first)

    def together(self, function: Callable[[], Found]) -> Found:
        error: Exception | None = None
        found: Any = None
        try:
            found = function()
        except Exception as caught:
            error = caught
        every = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(every):
            if text is not None:
                raise RankError(f"rank {rank} stopped: {text}")
        return found

    def on_main(self, function: Callable[[], Found]) -> Found:
        found: list[Any] = [None]

        def call() -> None:
            if self.is_main:
                found[0] = function()

        self.together(call)
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def gather(self, value: Any) -> list[Any]:
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, value)
        return every

    def lost(self, error: RuntimeError, where: str) -> RuntimeError | None:
        # gloo has no type of its own for it.
        if not isinstance(error, dist.DistError) and "onnection" not in str(error):
            return None
        first = str(error).splitlines()[0]
        again = "start all again to go on from the last checkpoint"
        return RankError(f"another process was lost {where}; {again} ({first})")

    def close(self) -> None:
        if self._joined and dist.is_initialized():
            # Nobody hangs up while another is still talking.
            dist.barrier()
            dist.destroy_process_group()

    def check_equal(self, facts: dict[str, Any]) -> None:
        every, wrong = self.gather(facts), []
        for name in every[0]:
            values = [other.get(name) for other in every]
            if any(value != values[0] for value in values):
                wrong.append(f"{name}: by rank {values}")
        if wrong:
            raise ValueError("the processes of a run must agree, got\n  " + "\n  ".join(wrong))


class LoopOutputsOf(nn.Module):
    """A decoder whose forward pass is loop_outputs: what DDP watches is a forward pass."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, *, step: int) -> LoopOutputs:
        return self.model.loop_outputs(tokens_BT, step=step)


class RankError(RuntimeError):
    """Another rank has stopped or died; its own message says more."""


def _fill(batch: np.ndarray, like: np.ndarray) -> tuple[np.ndarray, int]:
    missing = len(like) - len(batch)
    return (np.concatenate([batch, like[:missing]]) if missing else batch), len(batch)


def join(config: TrainConfig, device: torch.device) -> Alone:
    """The single process, or this rank among others.

    Raises:
        ValueError: torchrun has started several processes and the config is for one, or the other way round; the number
            of processes does not divide the batch.
    """
    mode, started = config.distributed.mode, int(os.environ.get("WORLD_SIZE", "1"))
    if mode != "none":
        return Ranks(config, device)
    if started > 1:
        raise ValueError(f"distributed.mode must be ddp, fsdp or hsdp for {started} processes, got 'none'")
    return ALONE


def device_of_rank(device: torch.device, config: TrainConfig) -> torch.device:
    """With several ranks a device of its own for each one of a machine."""
    if config.distributed.mode == "none" or device.type != "cuda" or device.index is not None:
        return device
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def versions() -> dict[str, str]:
    """What has to be the same on every rank for them to compute the same."""
    import effkern
    from effkern import native

    return {
        "effkern": effkern.__version__,
        "compiled part": native.load("_C") or "there",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
