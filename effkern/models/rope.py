"""Rotary positions: channels i and i + head_dim/2 of a head are turned by the angle position * theta^(-2i/head_dim)."""

import torch
from torch import Tensor


def rope_table(
    start: int, length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [length, head_dim/2], of positions start .. start+length-1; float32, or float64 for float64."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=wide) / head_dim
    angles = torch.arange(start, start + length, device=device, dtype=wide)[:, None] * theta**-exponents
    return angles.cos(), angles.sin()


def apply_rope(x_BHTD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every head of x by its position; rounded once to the dtype of x."""
    cos, sin = table
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHTD.dtype)
