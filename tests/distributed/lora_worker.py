"""What each process does for test_lora.py: LoRARite under DDP, FSDP2, and with factors of chosen placements."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from effkern.nn.lora import inject_lora, lora_layers
from effkern.optim import LoraPair, LoRARite

STEPS = 6
OPTIONS: dict[str, Any] = {"lr": 0.02, "escaped_mass": True, "clip_grad": 0.05}


def network() -> nn.Sequential:
    """Two ranks; 12 and 20 columns divide by 4, and B of the second layer has 10 rows, which do not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20, dtype=torch.float64), nn.Tanh(), nn.Linear(20, 10, dtype=torch.float64))
    inject_lora(net, ["0", "2"], rank=lambda name: 4 if name == "0" else 3, alpha=4.0)
    for layer in lora_layers(net).values():
        layer.factors()[1].data.normal_(std=0.1)
    return net


def batch(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(16, 10, generator=generator, dtype=torch.float64)
    return x.chunk(parts)[part], y.chunk(parts)[part]


def run(net: nn.Module, optimizer: LoRARite, part: int, parts: int, steps: int = STEPS) -> None:
    for step in range(steps):
        x, y = batch(step, part, parts)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def factors(net: nn.Module) -> list[Tensor]:
    return [whole(x.detach()).clone() for layer in lora_layers(net).values() for x in layer.factors()]


def by_ddp(rank: int, world: int) -> list[Tensor]:
    net = network()
    run(DistributedDataParallel(net), LoRARite(net, **OPTIONS), rank, world)
    return factors(net)


def by_fsdp(rank: int, world: int, rows: bool) -> dict[str, Any]:
    """FSDP2 cuts dimension 0, which is the rank of lora_A; `rows` tells it to cut A by its columns instead."""
    mesh = init_device_mesh("cpu", (world,))
    net = network()
    for layer in lora_layers(net).values():
        chosen = {id(layer.factors()[0])} if rows else set()
        fully_shard(layer, mesh=mesh, shard_placement_fn=lambda p, c=chosen: Shard(1) if id(p) in c else None)
    fully_shard(net, mesh=mesh)
    optimizer = LoRARite(net, **OPTIONS)
    run(net, optimizer, rank, world)
    stored = optimizer.state_dict()
    second = network()
    for layer in lora_layers(second).values():
        chosen = {id(layer.factors()[0])} if rows else set()
        fully_shard(layer, mesh=mesh, shard_placement_fn=lambda p, c=chosen: Shard(1) if id(p) in c else None)
    fully_shard(second, mesh=mesh)
    second.load_state_dict(net.state_dict())
    resumed = LoRARite(second, **OPTIONS)
    resumed.load_state_dict(stored)
    for model, at in ((net, optimizer), (second, resumed)):
        run(model, at, rank, world, steps=2)
    moments = [optimizer.state[p]["exp_avg"] for p in optimizer.param_groups[0]["params"]]
    return {
        "factors": factors(net),
        "resumed": factors(second),
        "local": sum(m.to_local().numel() for m in moments),
        "all": sum(m.numel() for m in moments),
    }


def by_placement(rank: int, world: int, two: bool) -> list[Tensor]:
    """A pair of which one factor is whole everywhere; a mesh of two dimensions; an odd number of rows."""
    generator = torch.Generator().manual_seed(7)
    A = torch.randn(3, 13, generator=generator, dtype=torch.float64)
    B = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    grads = [torch.randn(9, 13, generator=generator, dtype=torch.float64) / 100 for _ in range(STEPS)]
    if two:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
        places = [(Replicate(), Shard(1)), (Replicate(), Shard(0))]
    else:
        mesh = init_device_mesh("cpu", (world,))
        places = [(Replicate(),), (Shard(0),)]
    parameters = [nn.Parameter(distribute_tensor(x.clone(), mesh, p)) for x, p in zip((A, B), places)]
    optimizer = LoRARite([LoraPair("p", *parameters, 0, 1)], **OPTIONS)
    for G in grads:
        a, b = (whole(x.detach()) for x in parameters)
        for parameter, grad, place in zip(parameters, (b.T @ G, G @ a.T), places):
            parameter.grad = distribute_tensor(grad, mesh, place)
        optimizer.step()
    return [whole(x.detach()).clone() for x in parameters]


def low_start() -> tuple[list[Tensor], list[list[Tensor]]]:
    """bfloat16 factors, and gradients that do not depend on how they are rounded."""
    generator = torch.Generator().manual_seed(9)
    pair = [torch.randn(4, 13, generator=generator).bfloat16(), torch.randn(9, 4, generator=generator).bfloat16()]
    return pair, [[(torch.randn(x.shape, generator=generator) / 100).bfloat16() for x in pair] for _ in range(STEPS)]


def by_low_precision(rank: int, world: int) -> dict[str, Any]:
    """bfloat16 factors cut as FSDP cuts them, A along its rank; the last process of four has no row of B. Then a NaN in
    one process, and parameters and state of another time together."""
    mesh = init_device_mesh("cpu", (world,))
    pair, grads = low_start()
    parameters = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in pair]
    optimizer = LoRARite([LoraPair("p", *parameters, 0, 1)], **OPTIONS)
    for step, both in enumerate([*grads, grads[0]]):
        for parameter, grad in zip(parameters, both):
            parameter.grad = distribute_tensor(grad, mesh, [Shard(0)])
        if step == STEPS:
            found = [whole(x.detach()).clone() for x in parameters]
            masters = [whole(optimizer.state[x]["master"]).clone() for x in parameters]
            if rank == 1:
                parameters[1].grad.to_local().fill_(torch.nan)
        optimizer.step()
    after = [whole(x.detach()) for x in parameters]
    # The last process of four sees no change of B: all must take part in its new basis.
    with torch.no_grad():
        parameters[1].mul_(2.0)
    other = LoRARite([LoraPair("p", *parameters, 0, 1)], **OPTIONS)
    other.load_state_dict(optimizer.state_dict())
    for parameter, grad in zip(parameters, grads[0]):
        parameter.grad = distribute_tensor(grad, mesh, [Shard(0)])
    other.step()
    doubled = whole(other.state[parameters[1]]["master"])
    return {
        "found": found,
        "masters": masters,
        "untouched": all(torch.equal(x, y) for x, y in zip(found, after)),
        "doubled": doubled,
        "steps": int(optimizer.state[parameters[0]]["step"]),
    }


def alone() -> dict[str, list[Tensor]]:
    """What one process with all rows finds."""
    net = network()
    optimizer = LoRARite(net, **OPTIONS)
    run(net, optimizer, 0, 1)
    six = factors(net)
    run(net, optimizer, 0, 1, steps=2)
    generator = torch.Generator().manual_seed(7)
    A = nn.Parameter(torch.randn(3, 13, generator=generator, dtype=torch.float64))
    B = nn.Parameter(torch.randn(9, 3, generator=generator, dtype=torch.float64))
    plain = LoRARite([LoraPair("p", A, B, 0, 1)], **OPTIONS)
    for _ in range(STEPS):
        G = torch.randn(9, 13, generator=generator, dtype=torch.float64) / 100
        A.grad, B.grad = B.detach().T @ G, G @ A.detach().T
        plain.step()
    pair, grads = low_start()
    low = [nn.Parameter(x) for x in pair]
    optimizer = LoRARite([LoraPair("p", *low, 0, 1)], **OPTIONS)
    for both in grads:
        low[0].grad, low[1].grad = both
        optimizer.step()
    masters = [optimizer.state[x]["master"] for x in low]
    return {"six": six, "eight": factors(net), "pair": [A.detach(), B.detach()], "low": masters}


def work(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "lora-ddp": by_ddp(rank, world),
        "lora-fsdp": by_fsdp(rank, world, rows=False),
        "lora-fsdp-rows": by_fsdp(rank, world, rows=True),
        "lora-low": by_low_precision(rank, world),
        "lora-pair": by_placement(rank, world, two=False),
    }
    if world == 4:
        found["lora-pair-2d"] = by_placement(rank, world, two=True)
    dist.barrier()
    return found
