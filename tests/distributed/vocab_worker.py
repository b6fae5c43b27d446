"""What each process of a group does in the tests of the vocabulary-parallel loss."""

import math
import traceback
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

from effkern import TeacherHidden, TeacherLogits
from effkern.distributed import vocab_parallel_distill_loss
from effkern.ops.distill.rows import DIVERGENCES
from tests.distributed import vocab_cases
from tests.distributed.vocab_cases import Call, answer, cut, make, slice_sizes


def work(rank: int, world: int) -> dict[str, Any]:
    """All findings of one process, by test."""
    return {
        "answers": _answers(rank, world),
        "counts": _counts(rank, world),
        "dtensor": _dtensor(rank, world),
        "weight_grad": _weight_grad(rank, world),
        "no_grad": _no_grad(rank, world),
        "errors": _errors(rank, world),
    }


def _answers(rank: int, world: int) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, call in vocab_cases.cases().items():
        try:
            keywords = {
                "sequence_parallel": call.sequence_parallel, "check": name == "sum", "slices": slice_sizes(call, world)
            }  # fmt: skip
            given[name] = answer(cut(call, rank, world), vocab_parallel_distill_loss, **keywords)
        except Exception:
            given[name] = traceback.format_exc()
    return given


class _Counted:
    """Collectives by operation, while in use."""

    def __enter__(self) -> Counter:
        self.count: Counter = Counter()
        self.inner = dist.all_reduce

        def all_reduce(x, op=dist.ReduceOp.SUM, **keywords):
            self.count[(str(op).rsplit(".")[-1], x.numel())] += 1
            return self.inner(x, op, **keywords)

        dist.all_reduce = all_reduce
        return self.count

    def __exit__(self, *rest: Any) -> None:
        dist.all_reduce = self.inner


def _counts(rank: int, world: int) -> dict[str, list]:
    """All-reduces of one call, 10 rows that count in chunks of 5."""
    found = {}
    calls = {name: make(1, divergence=name) for name in DIVERGENCES}
    calls |= {"cross entropy": make(1, teacher=None), "sparse": make(1, teacher="truncated")}
    calls["tail_bucket"] = make(1, teacher="tail_bucket")
    for name, call in calls.items():
        own = cut(call, rank, world)
        keywords = {"chunk_bytes": 8 * 5 * -(-vocab_cases.VOCAB // world), "slices": slice_sizes(call, world)}
        with _Counted() as count:
            answer(own, vocab_parallel_distill_loss, **keywords)
        found[name] = sorted(count.items())
    return found


def _dtensor(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    call = replace(make(3, bias=True, teacher=vocab_cases._full_hidden, rows=12), sequence_parallel=False)
    own = cut(call, rank, world)
    shape = torch.Size(call.weight.shape)
    weight = DTensor.from_local(own.weight, mesh, [Shard(0)], shape=shape, stride=call.weight.stride())
    bias = DTensor.from_local(own.bias, mesh, [Shard(0)], shape=torch.Size([shape[0]]), stride=(1,))
    head = call.teacher.weight
    teacher_weight = DTensor.from_local(own.teacher.weight, mesh, [Shard(0)], shape=head.shape, stride=head.stride())
    teacher = TeacherHidden(own.teacher.hidden, teacher_weight, own.teacher.bias, own.teacher.softcap, 0.7)
    found: dict[str, Any] = {}
    for name, placement in (("replicated", Replicate()), ("sequence", Shard(0))):
        whole = call.hidden if placement.is_replicate() else call.hidden.chunk(world)[rank]
        hidden = DTensor.from_local(whole, mesh, [placement])
        spread = replace(own, hidden=hidden, weight=weight, bias=bias, teacher=teacher)
        given = answer(spread, vocab_parallel_distill_loss)
        for key in ("hidden", "weight", "bias"):
            x = given[key]
            assert isinstance(x, DTensor)
            assert x.placements == ((placement if key == "hidden" else Shard(0)),), (key, x.placements)
            given[key] = x.full_tensor()
        found[name] = given
    return found


def _weight_grad(rank: int, world: int) -> dict[str, Any]:
    call = make(5)
    own = cut(call, rank, world)
    total = torch.ones_like(own.weight)
    hidden, weight = own.hidden.clone().requires_grad_(), own.weight.clone().requires_grad_()
    result = vocab_parallel_distill_loss(
        hidden, weight, own.labels, teacher=own.teacher, weight_grad=total, group=dist.group.WORLD,
        slices=slice_sizes(call, world), **own.keywords,
    )  # fmt: skip
    result.loss.backward()
    assert weight.grad is None
    return {"total": total, "hidden": hidden.grad}


def _no_grad(rank: int, world: int) -> dict[str, Any]:
    """Without gradients there is no collective for them."""
    call = make(6)
    own = cut(call, rank, world)
    with torch.no_grad(), _Counted() as count:
        result = vocab_parallel_distill_loss(
            own.hidden, own.weight, own.labels, teacher=own.teacher, slices=slice_sizes(call, world), **own.keywords
        )
    widest = max(numel for _, numel in count)
    return {"loss": result.loss, "widest": widest}


def _errors(rank: int, world: int) -> dict[str, str]:
    """Messages of calls that are wrong on the last rank alone, or everywhere."""
    good, last = make(7, padded=24), rank == world - 1
    own = cut(good, rank, world)
    wrong: dict[str, tuple[Call, dict[str, Any]]] = {
        "option": (own, {"temperature": 1.75 if last else 1.5}),
        "number": (own, {"omega": 0.5 if last else 0.25, "z_loss": 0.125}),
        "tokens": (_first(own, 9 if last else 10), {"z_loss": 0.25}),
        "width": (replace(own, weight=own.weight[:, :3] if last else own.weight), {"z_loss": 0.375}),
        "range": (own, {"z_loss": -1.0 if last else 1.0}),
        "vocab_valid": (own, {"vocab_valid": 99}),
        "teacher": (replace(own, teacher=TeacherLogits(good.teacher.logits)), {}),
        "labels": (replace(own, labels=own.labels.flip(0) if last else own.labels), {"check": True}),
        "values": (_with_nan(own) if last else own, {"check": True}),
        "slices": (replace(own, weight=own.weight[:-1] if last else own.weight, teacher=None), {"omega": None}),
        "given slices": (own, {"slices": [24] + [0] * (world - 1)}),
        "impl": (own, {"impl": "compile", "z_loss": 0.5}),
        "label": (replace(own, labels=torch.full_like(own.labels, 77)), {}),
        "divergence": (own, {"divergence": "kl"}),
        "parameter": (own, {"divergence": "jsd"}),
    }
    messages = {}
    for name, (call, keywords) in wrong.items():
        try:
            answer(call, vocab_parallel_distill_loss, **keywords)
            messages[name] = "no error"
        except (ValueError, TypeError, NotImplementedError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    # The group is still in step.
    total = torch.ones(())
    dist.all_reduce(total)
    assert math.isclose(total.item(), world)
    return messages


def _first(call: Call, rows: int) -> Call:
    teacher = TeacherLogits(call.teacher.logits[:rows])
    return replace(call, hidden=call.hidden[:rows], labels=call.labels[:rows], teacher=teacher)


def _with_nan(call: Call) -> Call:
    logits = call.teacher.logits.clone()
    logits[0, 0] = torch.nan
    return replace(call, teacher=TeacherLogits(logits))
