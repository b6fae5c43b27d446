"""All LoRA factors of one rank, with what LoRA-RITE keeps of them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OP = "lora_rite"
MAX_RANK = 4096
DTYPES = (torch.float32, torch.float64)
STATE = ("moments", "whiten", "second", "transport", "escaped", "steps", "exact")


@dataclass(eq=False)
class RiteGroup:
    """P pairs of one rank r; factors 2 p and 2 p + 1 are a pair, and each is "the other" of its neighbour.

    Factor X is tall: rows x r. It is kept as [rows, r], or, where `wide` says so, as its transpose [r, rows].
    Shapes: F = 2 P factors. r x r state is float64.

        U = X whiten is orthonormal (columns of zeros where X has no full rank).
        moments   first moment of X's step, in the basis U of the *other* factor; layout and dtype of X
        second    [F, r] eigenvalues of X's second moment: the other factor's basis is turned into its eigenvectors
        transport [F, r, r] U_now^T U_before, with U_before the basis that the moments still are in
        escaped   [F] mass lost by transport;   steps [F] int64, steps done
        exact     [F] int32, 1 where the next step takes a float64 Gram matrix of X itself: no full rank, or nearly so

    All of `STATE` are plain tensors: copy them back in place, and a run goes on with the same bits.
    """

    factors: list[Tensor]
    wide: list[bool]
    moments: list[Tensor]
    whiten: Tensor
    second: Tensor
    transport: Tensor
    escaped: Tensor
    steps: Tensor
    exact: Tensor
    rows: Tensor
    """[F] float64: rows of each factor."""
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Tables of addresses on the device, by what they were made from."""

    @property
    def rank(self) -> int:
        return self.whiten.shape[-1]

    def state_bytes(self) -> int:
        """Bytes of the state, of all factors together."""
        tensors = [*self.moments, *(getattr(self, name) for name in STATE[1:])]
        return sum(t.numel() * t.element_size() for t in tensors)


def new_group(factors: Sequence[Tensor], wide: Sequence[bool]) -> RiteGroup:
    """A group before its first step; `whiten` is 0 until `lora_rite_rebuild_` has seen the factors."""
    rank = check_factors(factors, wide)
    count, like = len(factors), factors[0]

    def small(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=like.device)

    rows = [float(x.numel() // rank) for x in factors]
    return RiteGroup(
        factors=list(factors),
        wide=[bool(w) for w in wide],
        moments=[torch.zeros_like(x) for x in factors],
        whiten=small(count, rank, rank),
        second=small(count, rank),
        transport=torch.eye(rank, dtype=torch.float64, device=like.device).repeat(count, 1, 1),
        escaped=small(count),
        steps=small(count, dtype=torch.int64),
        exact=torch.ones(count, dtype=torch.int32, device=like.device),
        rows=torch.tensor(rows, dtype=torch.float64, device=like.device),
    )


def check_factors(factors: Any, wide: Any) -> int:
    """The rank that all factors share."""
    if not isinstance(factors, (list, tuple)) or not isinstance(wide, (list, tuple)):
        raise TypeError(f"{OP}: factors and wide must be lists, got {type(factors).__name__}, {type(wide).__name__}")
    if not factors or len(factors) % 2:
        raise ValueError(f"{OP}: factors must come in pairs A_0, B_0, A_1, B_1 ..., got {len(factors)}")
    if len(wide) != len(factors):
        raise ValueError(f"{OP}: wide must have one entry per factor, {len(factors)}, got {len(wide)}")
    rank = 0
    for i, (x, is_wide) in enumerate(zip(factors, wide)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: factors[{i}] must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES or x.dtype != factors[0].dtype:
            raise TypeError(f"{OP}: factors[{i}] must be float32 or float64, all of one dtype, got {x.dtype}")
        if x.dim() != 2 or x.numel() == 0:
            raise ValueError(f"{OP}: factors[{i}] must be a matrix that is not empty, got shape {tuple(x.shape)}")
        if x.device != factors[0].device:
            raise ValueError(f"{OP}: factors[{i}] must be on {factors[0].device}, got {x.device}")
        if not x.is_contiguous():
            raise ValueError(f"{OP}: factors[{i}] must be contiguous, got strides {x.stride()}")
        own = x.shape[0] if is_wide else x.shape[1]
        rank = rank or own
        if own != rank:
            where = "rows" if is_wide else "columns"
            raise ValueError(f"{OP}: factors[{i}] must have rank {rank} as factors[0] ({where}), got {tuple(x.shape)}")
    _check_apart(factors)
    if rank > MAX_RANK:
        raise ValueError(f"{OP}: factors must have a rank of at most {MAX_RANK}, got {rank}")
    return rank


def _check_apart(factors: Sequence[Tensor]) -> None:
    """Threads write them at the same time: no two may share memory."""
    if factors[0].device.type == "meta":
        return
    starts = sorted((x.data_ptr(), x.numel() * x.element_size(), i) for i, x in enumerate(factors))
    for (start, size, i), (following, _, j) in itertools.pairwise(starts):
        if start + size > following:
            raise ValueError(f"{OP}: factors must not share memory, got factors[{min(i, j)}] and factors[{max(i, j)}]")


def check_grads(grads: Any, group: RiteGroup) -> list[Tensor]:
    """Gradients as the kernels read them: contiguous, of the factors' dtype. A copy is made of all others."""
    if not isinstance(grads, (list, tuple)) or len(grads) != len(group.factors):
        raise ValueError(f"{OP}: grads must hold one entry per factor, {len(group.factors)}")
    checked = []
    for i, (g, x) in enumerate(zip(grads, group.factors)):
        if not isinstance(g, Tensor):
            raise TypeError(f"{OP}: grads[{i}] must be a tensor, got {type(g).__name__}; leave out the pair instead")
        if g.layout != torch.strided or not g.is_floating_point():
            raise TypeError(f"{OP}: grads[{i}] must be a dense floating tensor, got {g.dtype}, {g.layout}")
        if g.shape != x.shape:
            raise ValueError(
                f"{OP}: grads[{i}] must have the shape of its factor, {tuple(x.shape)}, got {tuple(g.shape)}"
            )
        if g.device != x.device:
            raise ValueError(f"{OP}: grads[{i}] must be on {x.device}, got {g.device}")
        checked.append(g.to(x.dtype).contiguous())
    return checked
