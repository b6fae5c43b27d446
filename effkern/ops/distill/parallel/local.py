"""DTensors as this rank's part of them."""

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from effkern.ops.distill.parallel.agree import OP, default_group
from effkern.ops.distill.types import Teacher, TeacherHidden, TeacherLogits, TeacherLogProbs


def is_dtensor(x: Any) -> bool:
    """Whether `x` is a DTensor; its module is heavy, and is there if one exists."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_sharded(x: Any, dim: int) -> bool:
    """Whether `x` is a DTensor of which each rank has a part along `dim`."""
    return is_dtensor(x) and x.placements[0].is_shard(dim)


def group_of(weight: Any, group: Any) -> dist.ProcessGroup:
    """The process group that `group` (or a one-dimensional device mesh, or the weight's own) stands for."""
    if group is None and is_dtensor(weight):
        group = weight.device_mesh
    if group is None:
        return default_group()
    if not hasattr(group, "get_group"):
        return group
    if group.ndim != 1:
        raise ValueError(f"{OP}: group must be a process group or a device mesh of one dimension, got {group.ndim}")
    return group.get_group()


def slices_of(weight: Any, slices: Sequence[int] | None, group: dist.ProcessGroup) -> tuple[int, ...]:
    """Rows of every rank's slice: as given, as a DTensor spreads them, or all alike."""
    ranks = group.size()
    if slices is not None:
        if len(slices) != ranks or any(not isinstance(n, int) or n < 0 for n in slices):
            raise ValueError(f"{OP}: slices must hold a number of rows for each of the {ranks} ranks, got {slices}")
        return tuple(slices)
    rows = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0
    if not is_dtensor(weight):
        return (rows,) * ranks
    most = -(-rows // ranks)
    return tuple(min(max(rows - rank * most, 0), most) for rank in range(ranks))


def part(name: str, x: Any, shard: int | None, group: dist.ProcessGroup) -> Any:
    """This rank's part of a DTensor that is sharded along `shard` (None: whole on every rank); others as they are.

    A gradient comes back as a DTensor of the same placement.
    """
    if not is_dtensor(x):
        return x
    if x.device_mesh.ndim != 1 or x.device_mesh.get_group() != group:
        raise ValueError(f"{OP}: {name} must live on the mesh of the group, got {x.device_mesh}")
    right = x.placements[0].is_replicate() if shard is None else x.placements[0].is_shard(shard)
    if not right:
        rule = "be replicated" if shard is None else f"be sharded along dimension {shard}"
        raise ValueError(f"{OP}: {name} must {rule}, got {x.placements[0]}")
    return x.to_local(grad_placements=x.placements)


def teacher_part(teacher: Teacher | None, group: dist.ProcessGroup) -> Teacher | None:
    """The teacher with this rank's slices."""
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(part("teacher.logits", teacher.logits, 1, group))
    if isinstance(teacher, TeacherLogProbs):
        return TeacherLogProbs(part("teacher.logprobs", teacher.logprobs, 1, group))
    if not isinstance(teacher, TeacherHidden):
        return teacher
    weight = part("teacher.weight", teacher.weight, 0, group)
    bias = part("teacher.bias", teacher.bias, 0, group)
    hidden = part("teacher.hidden", teacher.hidden, None, group)
    return TeacherHidden(hidden, weight, bias, teacher.softcap, teacher.logit_scale)


def slice_width(teacher: Teacher | None) -> int | None:
    """Entries of the vocabulary in a teacher's slice; None where it has no slices."""
    for name, dim in (("logits", 1), ("logprobs", 1), ("weight", 0)):
        x = getattr(teacher, name, None)
        if isinstance(teacher, (TeacherLogits, TeacherLogProbs, TeacherHidden)) and isinstance(x, Tensor):
            return x.shape[dim] if x.dim() > dim else None
    return None
