"""What each process does in the tests of the global denominator."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from effkern import TeacherLogits, linear_distill_loss
from effkern.distributed import global_count, vocab_parallel_distill_loss

ROWS, DIM, VOCAB = 7, 5, 12
KEYWORDS: dict[str, Any] = {"omega": 0.4, "temperature": 1.5, "teacher_temperature": 1.0}


class Model(nn.Module):
    """A layer and an output layer; the loss is inside, so that wrappers see one forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.head = nn.Linear(DIM, VOCAB, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor, teacher: Tensor, weights: Tensor | None, denom: Any) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return linear_distill_loss(
            hidden, self.head.weight, labels, bias=self.head.bias, teacher=TeacherLogits(teacher), weights=weights,
            denom=denom, **KEYWORDS,
        ).loss  # fmt: skip


def batch(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, labels, teacher, weights of one rank: 1, 4, 7, ... rows that count, and none on the last one."""
    torch.manual_seed(100 + rank)
    make = {"dtype": torch.float64}
    x, teacher, weights = torch.randn(ROWS, DIM, **make), torch.randn(ROWS, VOCAB, **make), torch.rand(ROWS, **make)
    labels = torch.randint(0, VOCAB, (ROWS,))
    labels[0 if rank == world - 1 else min(1 + 3 * rank, ROWS) :] = -100
    return x, labels, teacher, weights


def work(rank: int, world: int) -> dict[str, Any]:
    """All findings of one process, by test."""
    x, labels, teacher, weights = batch(rank, world)
    found: dict[str, Any] = {"count": global_count(labels), "weighted": global_count(labels, weights)}

    for name, given in (("ddp", None), ("ddp-weights", weights)):
        model = DistributedDataParallel(Model())
        loss = model(x, labels, teacher, given, global_count(labels, given, averaged=True))
        loss.backward()
        found[name] = (loss.detach(), [p.grad for p in model.parameters()])

    model = Model()
    for part in (model.body, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    loss = model(x, labels, teacher, None, global_count(labels, averaged=True))
    loss.backward()
    found["fsdp"] = (loss.detach(), [p.grad.full_tensor() for p in model.parameters()])

    model = Model()
    loss = model(x, labels, teacher, None, global_count(labels))
    loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    found["summed"] = (loss.detach(), [p.grad for p in model.parameters()])

    nobody = torch.full_like(labels, -100)
    found["nobody"] = Model()(x, nobody, teacher, None, global_count(nobody)).detach()
    if world == 4:
        found["both"] = _data_and_vocabulary(rank)
        found["both-fsdp"] = _fsdp_and_vocabulary(rank)
    return found


def _data_and_vocabulary(rank: int) -> Any:
    """Two data-parallel groups of two slices each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocab"))
    data, slot = divmod(rank, 2)
    x, labels, teacher, _ = batch(data, 3)
    model, part = Model(), slice(slot * VOCAB // 2, (slot + 1) * VOCAB // 2)
    weight, bias = (p.detach()[part].clone().requires_grad_() for p in (model.head.weight, model.head.bias))
    loss = vocab_parallel_distill_loss(
        torch.tanh(model.body(x)), weight, labels, bias=bias, group=mesh["vocab"],
        teacher=TeacherLogits(teacher[:, part]), denom=global_count(labels, group=mesh["data"]), **KEYWORDS,
    ).loss  # fmt: skip
    loss.backward()
    grads = [model.body.weight.grad, model.body.bias.grad, weight.grad, bias.grad]
    for grad in grads:
        dist.all_reduce(grad, group=mesh.get_group("data"))
    return loss.detach(), grads


class SlicedModel(Model):
    """The output layer as DTensors over the ranks with other slices."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        for name, p in list(self.head.named_parameters()):
            self.head.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))

    def forward(self, x: Tensor, labels: Tensor, teacher: Tensor, weights: Tensor | None, denom: Any) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return vocab_parallel_distill_loss(
            hidden, self.head.weight, labels, bias=self.head.bias, teacher=TeacherLogits(teacher), weights=weights,
            denom=denom, **KEYWORDS,
        ).loss  # fmt: skip


def _fsdp_and_vocabulary(rank: int) -> Any:
    """The same mesh, with FSDP over the ranks with other tokens, which averages."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocab"))
    data, slot = divmod(rank, 2)
    x, labels, teacher, _ = batch(data, 3)
    model = SlicedModel(mesh["vocab"])
    fully_shard(model, mesh=mesh["data"])
    denom = global_count(labels, group=mesh["data"], averaged=True)
    loss = model(x, labels, teacher[:, slot * VOCAB // 2 : (slot + 1) * VOCAB // 2], None, denom)
    loss.backward()
    return loss.detach(), [p.grad.full_tensor() for p in model.parameters()]
