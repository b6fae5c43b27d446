"""A factor as the matrix the kernels read and write: a view of its parameter, a float32 copy of it, or a row shard.

A sharded parameter (DTensor) takes part with its own rows. Where it is cut along the rank instead, as FSDP cuts
lora_A.weight [r, in] by default, its rows are exchanged for a step, and its moment stays cut by rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effkern.ops.lora_rite import RiteGroup
from effkern.optim.lora.pairs import tall


def compute_dtype(*factors: Tensor) -> torch.dtype:
    """float64 for a pair with a float64 factor, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in factors) else torch.float32


def mesh_of(tensor: Tensor) -> Any:
    """The DeviceMesh of a DTensor, None for a plain tensor."""
    return getattr(tensor, "device_mesh", None)


@dataclass(eq=False)
class Layout:
    """How one parameter becomes a contiguous matrix [rows, r], or [r, rows] where `wide`."""

    param: Tensor
    rank_dim: int
    wide: bool
    placements: tuple[Any, ...] | None
    """Of the step, for a DTensor: sharded by rows."""

    @property
    def moves(self) -> bool:
        """The step's placements are not the parameter's."""
        return self.placements is not None and self.placements != tuple(self.param.placements)  # type: ignore[attr-defined]

    @property
    def rows(self) -> int:
        """Of all shards."""
        return self.param.numel() // self.param.shape[self.rank_dim]

    def placed(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape, on the step's placements; local."""
        if self.placements is None:
            return tensor
        if mesh_of(tensor) is None:
            raise TypeError(f"LoRA gradient must be a DTensor as its parameter is, got {type(tensor).__name__}")
        return tensor.redistribute(placements=self.placements).to_local()  # type: ignore[attr-defined]

    def matrix(self, local: Tensor, like: Tensor | None = None) -> Tensor:
        """`local` as the kernels take it; a view of a tensor in the parameter's layout."""
        if local.dim() == 2:
            return local if (self.rank_dim == 0) == self.wide else local.T
        rows = tall(local, self.rank_dim, like)
        return rows.T if self.wide else rows

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """A zero tensor of the parameter's shape on the step's placements, as state keeps it."""
        if self.placements is None:
            return torch.zeros_like(self.param, dtype=dtype, requires_grad=False)
        return torch.zeros_like(self.param.detach().redistribute(placements=self.placements), dtype=dtype)  # type: ignore[attr-defined]


def local_of(tensor: Tensor) -> Tensor:
    return tensor if mesh_of(tensor) is None else tensor.to_local()  # type: ignore[attr-defined]


def layout_of(name: str, param: Tensor, rank_dim: int) -> Layout:
    """The layout of a factor.

    Raises:
        ValueError: a parameter with gaps in memory.
        NotImplementedError: a DTensor that is a partial sum or cut in strides.
    """
    if mesh_of(param) is None:
        return Layout(param, rank_dim, _is_wide(name, param, rank_dim), None)
    from torch.distributed.tensor import Replicate, Shard

    placements = []
    for placement in param.placements:  # type: ignore[attr-defined]
        if type(placement) not in (Replicate, Shard):
            raise NotImplementedError(f"{name}: a DTensor must be replicated or sharded, got {placement}")
        if isinstance(placement, Shard) and placement.dim % param.dim() == rank_dim:
            placement = Shard(0 if rank_dim else 1)
        placements.append(placement)
    own = tuple(placements)
    local = param.to_local() if own == tuple(param.placements) else None  # type: ignore[attr-defined]
    wide = rank_dim == 0 if local is None or local.numel() == 0 else _is_wide(name, local, rank_dim)
    return Layout(param, rank_dim, wide, own)


def _is_wide(name: str, param: Tensor, rank_dim: int) -> bool:
    rows = tall(param.detach(), rank_dim)
    if rows.is_contiguous() and not (rank_dim == 0 and rows.T.is_contiguous()):
        return False
    if rows.T.is_contiguous():
        return True
    raise ValueError(
        f"{name}: a factor must be dense in memory, got shape {list(param.shape)} with strides {param.stride()}"
    )


class RowSums:
    """Sums over rows, added up over the processes of the mesh that the factors of one run are cut over."""

    def __init__(self, layouts: list[Layout], factors: list[Tensor]) -> None:
        from torch.distributed.tensor import Shard

        mesh = next(mesh_of(x.param) for x in layouts if x.placements is not None)
        dims = range(mesh.ndim)
        cut = [[isinstance(p, Shard) for p in x.placements] if x.placements else [False] * mesh.ndim for x in layouts]
        shared = [d for d in dims if any(c[d] for c in cut)]
        self.groups = [mesh.get_group(d) for d in shared]
        first = {d: mesh.get_local_rank(d) == 0 for d in shared}
        # A factor that is whole on several processes is counted by the first of them alone.
        self.device = factors[0].device
        self.kept: dict[tuple[bool, ...], Tensor] = {}
        self.counts = {id(f): all(c[d] or first[d] for d in shared) for f, c in zip(factors, cut)}

    def anywhere(self, here: list[bool]) -> list[bool]:
        """Which of these hold on any process; for all of them to call."""
        import torch.distributed as dist

        found = torch.tensor(here, dtype=torch.float32, device=self.device)
        for processes in self.groups:
            dist.all_reduce(found, group=processes)
        return (found > 0).tolist()

    def __call__(self, group: RiteGroup, x: Tensor) -> Tensor:
        import torch.distributed as dist

        key = tuple(self.counts[id(f)] for f in group.factors)
        keep = self.kept.get(key)
        if keep is None:
            keep = self.kept[key] = torch.tensor(key, device=x.device)
        x = torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, 0.0).contiguous()
        for processes in self.groups:
            dist.all_reduce(x, group=processes)
        return x
