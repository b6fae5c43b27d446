"""The looping regulariser as one writes it in PyTorch, with autograd's gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor


def loop_similarity(tensors: Sequence[Tensor], layers: Sequence[int], block: int) -> Tensor:
    """R of each group; `tensors`: those of all groups, one group after the other."""
    values, first = [], 0
    for count in layers:
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)).flatten() for t in tensors[first : first + count]]
        first += count
        pairs = [_cosine(u, v) for u, v in zip(wide, wide[block:])]
        values.append(torch.stack(pairs).sum() / (count - block))
    kind = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
    return torch.stack([v.to(kind) for v in values])


def _cosine(u: Tensor, v: Tensor) -> Tensor:
    """0, without a gradient, where one of them is zero."""
    squares = (u * u).sum(), (v * v).sum()
    zero = (squares[0] == 0) | (squares[1] == 0)
    # The choice comes before the root as well, whose slope at 0 has no end.
    sizes = [torch.where(zero, 1.0, square).sqrt() for square in squares]
    return torch.where(zero, 0.0, (u * v).sum() / (sizes[0] * sizes[1]))
