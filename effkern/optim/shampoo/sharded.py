"""Parameters that several processes hold in parts (DTensor): which of them, and how to get at the whole."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Layout(NamedTuple):
    """How the processes of `group` share a matrix."""

    kind: str
    """reduce: each holds whole columns (rows) of the preconditioned side, and Gram products add up over processes.
    gather: the preconditioned side itself is cut, so the whole matrix is brought together, one family at a time."""
    dim: int
    group: Any
    mesh: Any
    """To tell apart parameters of different meshes."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing what defines them."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def layout_of(parameter: Tensor, name: str, left: bool, right: bool) -> Layout | None:
    """None: every process that holds it holds the whole.

    Raises:
        NotImplementedError: it is cut along two mesh dimensions, or a placement is neither Shard nor Replicate.
    """
    if not is_sharded(parameter):
        return None
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    cut = [(i, p) for i, p in enumerate(placements) if type(p) is not Replicate and mesh.size(i) > 1]
    if not cut:
        return None
    if len(cut) > 1 or type(cut[0][1]) is not Shard:
        raise NotImplementedError(
            f"Shampoo: {name} must be cut along one mesh dimension by Shard, got placements {tuple(placements)}"
        )
    mesh_dim, placement = cut[0]
    dim = placement.dim % parameter.dim()
    adds_up = (dim == 0 and right and not left) or (dim == 1 and parameter.dim() == 2 and left and not right)
    return Layout("reduce" if adds_up else "gather", dim, mesh.get_group(mesh_dim), (mesh, mesh_dim))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every process."""
    return tensor.full_tensor()  # type: ignore[attr-defined]


def put_back(full: Tensor, tensor: Tensor, layout: Layout) -> None:
    """Copy this process's part of `full` into the DTensor; parts are those of torch.chunk."""
    parts = full.chunk(dist.get_world_size(layout.group), layout.dim)
    rank = dist.get_rank(layout.group)
    if rank < len(parts):
        local(tensor).copy_(parts[rank])


def add_up(tensor: Tensor, layout: Layout | None) -> Tensor:
    """Sum over the processes of the layout, in place."""
    if layout is not None and layout.kind == "reduce":
        dist.all_reduce(tensor, group=layout.group)
    return tensor


def share_of(count: int, group: Any) -> tuple[int, int]:
    """First and one-past-last of `count` matrices whose roots this process takes; all of them without a group."""
    if group is None:
        return 0, count
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    each = -(-count // size)
    return min(count, rank * each), min(count, (rank + 1) * each)


def gather_shares(stack: Tensor, group: Any) -> None:
    """Every process ends up with every process's share of `stack` [count, ..], in place."""
    size, count = dist.get_world_size(group), stack.shape[0]
    each = -(-count // size)
    first, last = share_of(count, group)
    mine = stack.new_zeros((each, *stack.shape[1:]))
    mine[: last - first] = stack[first:last]
    everything = stack.new_empty((size * each, *stack.shape[1:]))
    # The newer name of the same.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everything, mine, group=group)
    stack.copy_(everything[:count])


def same_device_zeros(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the parameter's shape, layout in memory and placement."""
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
