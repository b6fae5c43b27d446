"""What each of two processes does in the tests of looped blocks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from effkern.nn import LoopedBlock, PoissonLognormalLoops, Truncated
from tests.nn.looped_cases import DIM, Layer

WORLD, LOOPS = 2, 5
MODES = {"full": "full", "recompute": "recompute", "recompute_layer": "recompute_layer", "truncated": Truncated(2)}


class Model(nn.Module):
    """A layer, two layers looped with an injection and a norm, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = Layer(), Layer()
        self.block = LoopedBlock([Layer(), Layer()], LOOPS, dim=DIM, injection="linear", norm=True, dtype=torch.float64)

    def forward(self, x: Tensor, mode: Any, loops: int = LOOPS) -> Tensor:
        return self.last(self.block(self.first(x), mode=mode, loops=loops)).square().mean()


class Collectives(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def batch(rank: int) -> Tensor:
    torch.manual_seed(100 + rank)
    return torch.randn(7, DIM, dtype=torch.float64)


def grads(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def work(rank: int) -> dict[str, Any]:
    """All findings of one process, by test."""
    found: dict[str, Any] = {}
    for name, mode in MODES.items():
        found[f"looped-ddp-{name}"] = _ddp(rank, mode)
        found[f"looped-fsdp-{name}"] = _fsdp(rank, mode)
        found[f"looped-fsdp-layers-{name}"] = _fsdp(rank, mode, layers=True)
    found["looped-fsdp-half"] = _fsdp(rank, "recompute", MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    sampler = PoissonLognormalLoops(20)
    found["looped-draws"] = [sampler.draw(step, seed=3) for step in range(10)]
    return found


def _ddp(rank: int, mode: Any) -> Any:
    """Gradients of two steps of different length, and how often each parameter was reduced in them."""
    # A small bucket, so that reductions happen while backward goes on.
    model = DistributedDataParallel(Model(), bucket_cap_mb=0.0001)
    reduced: dict[str, int] = {}
    names = {id(p): n for n, p in model.module.named_parameters()}

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        for p in bucket.parameters():
            reduced[names[id(p)]] = reduced.get(names[id(p)], 0) + 1
        work = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, hook)
    outcomes = []
    for loops in (LOOPS, 3):
        model.zero_grad()
        model(batch(rank), mode, loops).backward()
        outcomes.append([p.grad.clone() for p in model.parameters()])
    return outcomes, reduced


def _fsdp(rank: int, mode: Any, policy: MixedPrecisionPolicy | None = None, layers: bool = False) -> Any:
    """Gradients, and how often parameters were gathered and gradients reduced in one step."""
    model, mesh = Model(), init_device_mesh("cpu", (WORLD,))
    options = {"mesh": mesh} if policy is None else {"mesh": mesh, "mp_policy": policy}
    # All units are gathered once forward and once backward, the root's too.
    units = [model.first, *(model.block.core if layers else [model.block]), model.last]
    for unit in units:
        fully_shard(unit, reshard_after_forward=True, **options)
    fully_shard(model, **options)
    counts = []
    for loops in (LOOPS, 3):
        model.zero_grad()
        with Collectives() as seen:
            model(batch(rank), mode, loops).backward()
        counts.append(seen.counts)
    model.zero_grad()
    model(batch(rank), mode).backward()
    return grads(model), counts
