"""Both means in Triton: one program per group, which holds the sums of a whole row; no atomics.

Rows are taken in tiles of BLOCK_T x BLOCK_D. Sums stay a tile until the end, so that additions of a column are spread
over BLOCK_T chains. No GPU has timed it yet.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile of rows.
TILE = 4096


@triton.jit
def _finish(sums, kept, NORMALIZE: tl.constexpr):
    mean = sums / tl.maximum(kept, 1).to(tl.float32)
    if NORMALIZE:
        # Squares of what is very large or small would leave the range. NaN passes through: NaN is no zero.
        largest = tl.max(tl.abs(mean), 0)
        mean = mean / tl.where(largest == 0.0, 1.0, largest)
        mean = mean / tl.where(largest == 0.0, 1.0, tl.sqrt(tl.sum(mean * mean, 0)))
    return mean


@triton.jit
def mean_pool_kernel(
    table_ptr, ids_ptr, offsets_ptr, out_ptr, table_stride, num_rows, num_ids, dim, pad, eod,
    NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(offsets_ptr + group), 0)
    end = tl.minimum(tl.load(offsets_ptr + group + 1), num_ids)
    column = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    counts = tl.zeros([BLOCK_T], tl.int32)
    for first in range(begin, end, BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)
        row = tl.load(ids_ptr + at, mask=at < end, other=-1).to(tl.int64)
        kept = (at < end) & (row != pad) & (row != eod)
        sound = kept & (row >= 0) & (row < num_rows)
        place = table_ptr + row[:, None] * table_stride + column[None, :]
        x = tl.load(place, mask=sound[:, None] & (column < dim)[None, :], other=0.0).to(tl.float32)
        sums += tl.where((kept & ~sound)[:, None], float("nan"), x)
        counts += kept.to(tl.int32)
    mean = _finish(tl.sum(sums, 0), tl.sum(counts, 0), NORMALIZE)
    tl.store(out_ptr + group * dim + column, mean, mask=column < dim)


@triton.jit
def norm_mean_pool_kernel(
    hidden_ptr, offsets_ptr, keep_ptr, weight_ptr, out_ptr, hidden_stride, num_rows, dim, eps,
    HAS_KEEP: tl.constexpr, HAS_NORM: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(offsets_ptr + group), 0)
    end = tl.minimum(tl.load(offsets_ptr + group + 1), num_rows)
    column = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    counts = tl.zeros([BLOCK_T], tl.int32)
    for first in range(begin, end, BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)
        kept = at < end
        if HAS_KEEP:
            kept = kept & (tl.load(keep_ptr + at, mask=kept, other=0) != 0)
        place = hidden_ptr + at.to(tl.int64)[:, None] * hidden_stride + column[None, :]
        x = tl.load(place, mask=kept[:, None] & (column < dim)[None, :], other=0.0).to(tl.float32)
        if HAS_NORM:
            # A row that does not count is 0, and eps may be.
            mean_square = tl.where(kept, tl.sum(x * x, 1) / dim + eps, 1.0)
            x = x / tl.sqrt(mean_square)[:, None]
        sums += x
        counts += kept.to(tl.int32)
    total = tl.sum(sums, 0)
    if HAS_NORM:
        total *= tl.load(weight_ptr + column, mask=column < dim, other=0.0).to(tl.float32)
    mean = _finish(total, tl.sum(counts, 0), NORMALIZE)
    tl.store(out_ptr + group * dim + column, mean, mask=column < dim)


def _blocks(dim: int) -> dict[str, int]:
    columns = max(16, triton.next_power_of_2(dim))
    return {"BLOCK_T": max(1, TILE // columns), "BLOCK_D": columns}


def _warps(dim: int) -> int:
    """At most 32 elements of a tile per thread."""
    return 4 if dim <= 4096 else 8


def mean_pool(table: Tensor, ids: Tensor, offsets: Tensor, pad: int, eod: int, normalize: bool) -> Tensor:
    out = table.new_empty((len(offsets) - 1, table.shape[1]), dtype=torch.float32)
    if out.shape[0]:
        with torch.cuda.device_of(table):
            mean_pool_kernel[(out.shape[0],)](
                table, ids, offsets, out, table.stride(0), table.shape[0], len(ids), table.shape[1], pad, eod,
                NORMALIZE=normalize, num_warps=_warps(table.shape[1]), **_blocks(table.shape[1]),
            )  # fmt: skip
    return out


def norm_mean_pool(
    hidden: Tensor, offsets: Tensor, keep: Tensor | None, weight: Tensor | None, eps: float, normalize: bool
) -> Tensor:
    out = hidden.new_empty((len(offsets) - 1, hidden.shape[1]), dtype=torch.float32)
    if out.shape[0]:
        flags = None if keep is None else keep.view(torch.uint8)
        with torch.cuda.device_of(hidden):
            norm_mean_pool_kernel[(out.shape[0],)](
                hidden, offsets, flags, weight, out, hidden.stride(0), hidden.shape[0], hidden.shape[1], eps,
                HAS_KEEP=keep is not None, HAS_NORM=weight is not None, NORMALIZE=normalize,
                num_warps=_warps(hidden.shape[1]), **_blocks(hidden.shape[1]),
            )  # fmt: skip
    return out


def _cases(name: str, kind: str, dim: int) -> dict[str, tuple]:
    sizes: dict[str, Any] = {"NORMALIZE": True, **_blocks(dim)}
    common = {"offsets_ptr": "*i64", "out_ptr": "*fp32", "num_rows": "i32", "dim": "i32:16"}
    table = {"table_ptr": kind, "ids_ptr": "*i64", "table_stride": "i32:16", "num_ids": "i32", "pad": "i32"}
    hidden = {"hidden_ptr": kind, "keep_ptr": "*u8", "weight_ptr": kind, "hidden_stride": "i32:16", "eps": "fp32"}
    flags = {"HAS_KEEP": True, "HAS_NORM": True}
    return {
        f"table_{name}_{dim}": (mean_pool_kernel, {**common, **table, "eod": "i32"}, sizes, _warps(dim)),
        f"hidden_{name}_{dim}": (norm_mean_pool_kernel, {**common, **hidden}, {**sizes, **flags}, _warps(dim)),
    }


COMPILE_CASES = {
    **_cases("fp32", "*fp32", 64),
    **_cases("bf16", "*bf16", 64),
    **_cases("bf16", "*bf16", 512),
    **_cases("fp32", "*fp32", 2048),
    **_cases("fp32", "*fp32", 8192),
}
