"""Work of one process: Shampoo over replicated and sharded parameters beside the same on whole ones.

In float64, where nothing but the order of sums differs.
"""

import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from effkern.optim import OneSidedShampoo, Shampoo

# Fewer rows than processes, sizes that nothing divides, wide, tall, a convolution and a vector.
SHAPES = [(3, 7), (6, 6), (5, 13), (13, 5), (6, 3, 2, 2), (9,)]
CASES: dict[str, dict[str, Any]] = {
    "left": {"side": "left"},
    "right": {"side": "right", "grafting": "adam"},
    "auto": {"weight_decay": 0.1},
    "both": {"side": "both", "block_size": 4, "grafting": "none"},
    "blocks": {"side": "auto", "block_size": 3, "grafting": "sgd", "start_step": 2},
    "kl": {"side": "both", "accumulation": "kl", "grafting": "none", "ridge": 1e-2},
    "not finite": {},
}
# Of them those that four processes run: more processes than rows, and what every process must hear of.
FOUR = ("right", "auto", "not finite")
STEPS = 4


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative difference of a parameter."""
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, wanted))


def whole_run(case: str) -> list[Tensor]:
    parameters = [nn.Parameter(w) for w in weights()]
    optimizer = Shampoo(parameters, lr=0.1, **CASES[case])
    for step in range(STEPS):
        for p, grad in zip(parameters, gradients(step)):
            p.grad = spoiled(grad, case, step)
        optimizer.step()
    return [p.detach() for p in parameters]


def spoiled(grad: Tensor, case: str, step: int) -> Tensor:
    """In one case an entry of every gradient, which one process holds, is NaN at one step."""
    if case == "not finite" and step == 1:
        grad.view(-1)[0] = torch.nan
    return grad


def sharded_run(case: str, mesh: DeviceMesh, dim: int) -> list[Tensor]:
    """Cut along the last dimension of the mesh; copies along the others."""

    def cut(tensor: Tensor) -> DTensor:
        copies: list[Any] = [Replicate()] * (mesh.ndim - 1)
        return distribute_tensor(tensor, mesh, [*copies, Shard(dim if tensor.dim() == 2 else 0)])

    parameters = [nn.Parameter(cut(w)) for w in weights()]
    optimizer = Shampoo(parameters, lr=0.1, root_group=mesh.get_group(mesh.ndim - 1), **CASES[case])
    for step in range(STEPS):
        for p, grad in zip(parameters, gradients(step)):
            p.grad = cut(spoiled(grad, case, step))
        optimizer.step()
    return [p.detach().full_tensor() for p in parameters]


def refusal(mesh: DeviceMesh) -> str:
    """What is said of a weight that is cut along both dimensions of a mesh."""
    w = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(0), Shard(1)]))
    w.grad = torch.zeros_like(w)
    try:
        Shampoo([("w", w)]).step()
    except NotImplementedError as error:
        return str(error)
    return "nothing"


def failing_root(world: int) -> str:
    """What is said of a root that one process takes and that fails."""
    parameters = [nn.Parameter(torch.ones(4, 6)) for _ in range(world)]
    optimizer = Shampoo(parameters, root_group=dist.group.WORLD, max_failures=1)
    for step in range(2):
        for p in parameters:
            p.grad = torch.eye(4, 6)
        if step:
            optimizer.state[parameters[0]]["left"][0, 1, 1] = torch.nan
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
    return "nothing"


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6), nn.Linear(6, 11)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randint(0, 11, (8,), generator=generator) for _ in range(2))  # type: ignore[return-value]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, rank: int, world: int) -> None:
    for step in range(first, last):
        inputs, targets = (t.chunk(world)[rank] for t in batch(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()


def data_parallel(rank: int, world: int) -> dict[str, float]:
    """DDP with roots spread over the processes, beside one process with the whole batch."""
    options: dict[str, Any] = {"lr": 0.05, "side": "both", "precondition_frequency": 2}
    alone = model()
    train(alone, Shampoo(alone.parameters(), **options), 0, STEPS, 0, 1)
    found = {}
    for name, group in (("spread", dist.group.WORLD), ("each", None)):
        net = DistributedDataParallel(model())
        train(net, Shampoo(net.parameters(), root_group=group, **options), 0, STEPS, rank, world)
        found[name] = [p.detach() for p in net.parameters()]
    others: list[Any] = [None] * world
    dist.all_gather_object(others, found["spread"])
    return {
        "ddp": distance(found["spread"], [p.detach() for p in alone.parameters()]),
        "spread": distance(found["spread"], found["each"]),
        "ranks": max(distance(found["spread"], other) for other in others),
    }


def fully_sharded(mesh: DeviceMesh) -> tuple[nn.Module, OneSidedShampoo]:
    net = model()
    for layer in (net[1], net[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, OneSidedShampoo(net.parameters(), lr=0.05, weight_decay=0.1, precondition_frequency=2)


def resharding(rank: int, world: int) -> dict[str, float]:
    """FSDP2 on all processes, a distributed checkpoint, and the same run on half of them; beside one process."""
    alone = model()
    optimizer = OneSidedShampoo(alone.parameters(), lr=0.05, weight_decay=0.1, precondition_frequency=2)
    train(alone, optimizer, 0, 5, 0, 1)
    middle, factor = [p.detach().clone() for p in alone.parameters()], factor_of(alone, optimizer).clone()
    train(alone, optimizer, 5, 8, 0, 1)

    everyone = DeviceMesh("cpu", list(range(world)))
    half = DeviceMesh("cpu", list(range(world // 2)))
    names: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(names)
    net, first = fully_sharded(everyone)
    train(net, first, 0, 5, rank, world)
    found = {"fsdp": distance([p.detach().full_tensor() for p in net.parameters()], middle)}
    dcp.save({"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, first)}, checkpoint_id=names[0])
    if rank < world // 2:
        other, second = fully_sharded(half)
        state = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, second)}
        dcp.load(state, checkpoint_id=names[0], process_group=half.get_group())
        other.load_state_dict(state["model"])
        set_optimizer_state_dict(other, second, state["optimizer"])
        found["factor"] = distance([factor_of(other, second)], [factor])
        train(other, second, 5, 8, rank, world // 2)
        found["resharded"] = distance(
            [p.detach().full_tensor() for p in other.parameters()], [p.detach() for p in alone.parameters()]
        )
    dist.barrier()
    return found


def factor_of(net: nn.Module, optimizer: OneSidedShampoo) -> Tensor:
    return optimizer.state[net[1].weight]["right"]  # type: ignore[index]


def work(rank: int, world: int) -> dict[str, Any]:
    mesh = DeviceMesh("cpu", list(range(world)))
    found: dict[str, Any] = {}
    # The names of parameters with a gradient that is not finite; the warning is a test elsewhere.
    warnings.filterwarnings("ignore", "Shampoo: (gradient|inverse root)")
    for case in CASES if world == 2 else FOUR:
        wanted = whole_run(case)
        for dim in (0, 1):
            found[f"{case}, shard {dim}"] = distance(sharded_run(case, mesh, dim), wanted)
    found |= data_parallel(rank, world)
    found["failing root"] = failing_root(world)
    if world == 4:
        square = DeviceMesh("cpu", [[0, 1], [2, 3]])
        found["copies of shards"] = max(distance(sharded_run("auto", square, d), whole_run("auto")) for d in (0, 1))
        found["cut twice"] = refusal(square)
        found |= resharding(rank, world)
    return {"shampoo": found}
