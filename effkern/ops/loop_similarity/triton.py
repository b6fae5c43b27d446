"""Forward and backward of the looping regulariser in Triton: all tensors of a dtype in one launch.

A group's layers j, j + k, j + 2k ... are a chain. A program takes ranges of elements of a whole chain, so that what it
read as the second of a pair is in registers as the first of the next: memory is read once. Tensors come by a table of
addresses. Forward moves each tensor once, backward twice (read, write). No GPU has timed it yet.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Elements of a step, and programs per chain: enough for 132 multiprocessors from few chains on.
BLOCK = 4096
PROGRAMS = 64
WARPS = 8


@triton.jit
def _address(table_ptr, i, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table_ptr + i).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def loop_similarity_fwd_kernel(
    table_ptr, chains_ptr, sums_ptr, num_ranges,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """chains: first tensor, distance of the next, number of tensors, elements. sums [tensors, ranges, 2]: of a range's
    squares, and of the products with the tensor before; 0 beyond a chain's end."""
    chain = chains_ptr + tl.program_id(1) * 4
    first = tl.load(chain)
    distance = tl.load(chain + 1)
    length = tl.load(chain + 2)
    size = tl.load(chain + 3)
    for part in range(tl.program_id(0), num_ranges, tl.num_programs(0)):
        at = (tl.zeros([BLOCK], tl.int64) + part) * BLOCK + tl.arange(0, BLOCK)
        before = tl.zeros([BLOCK], tl.float32)
        for i in range(length):
            tensor = first + i * distance
            now = tl.load(_address(table_ptr, tensor, TYPE, ALIGNED) + at, mask=at < size, other=0.0).to(tl.float32)
            to = sums_ptr + (tensor * num_ranges + part) * 2
            tl.store(to, tl.sum(now * now, 0))
            tl.store(to + 1, tl.sum(now * before, 0))
            before = now


@triton.jit
def loop_similarity_finish_kernel(
    sums_ptr, groups_ptr, values_ptr, factors_ptr, block, LAYERS: tl.constexpr
):  # fmt: skip
    """One program per group. sums [tensors, 2] in float64; groups: first tensor, number of layers."""
    group = tl.program_id(0)
    first = tl.load(groups_ptr + group * 2)
    count = tl.load(groups_ptr + group * 2 + 1)
    layer = tl.arange(0, LAYERS)
    inside = layer < count
    has_before, has_after = inside & (layer >= block), inside & (layer + block < count)
    at = sums_ptr + (first + layer) * 2
    square = tl.load(at, mask=inside, other=0.0)
    square_before = tl.load(at - 2 * block, mask=has_before, other=0.0)
    square_after = tl.load(at + 2 * block, mask=has_after, other=0.0)
    # A tensor of zeros is like no other, and moves nothing. NaN is no zero.
    has_before = has_before & (square != 0.0) & (square_before != 0.0)
    has_after = has_after & (square != 0.0) & (square_after != 0.0)
    own = tl.where(inside & (square != 0.0), square, 1.0)
    weight = 1.0 / (count - block).to(tl.float64)
    inverse_before = 1.0 / tl.sqrt(tl.where(has_before, own, 1.0)) / tl.sqrt(tl.where(has_before, square_before, 1.0))
    inverse_after = 1.0 / tl.sqrt(tl.where(has_after, own, 1.0)) / tl.sqrt(tl.where(has_after, square_after, 1.0))
    before = tl.load(at + 1, mask=has_before, other=0.0) * inverse_before
    after = tl.load(at + 1 + 2 * block, mask=has_after, other=0.0) * inverse_after
    tl.store(values_ptr + group, tl.sum(before * weight, 0).to(tl.float32))
    to = factors_ptr + (first + layer) * 3
    tl.store(to, tl.where(has_before, weight * inverse_before, 0.0), mask=inside)
    tl.store(to + 1, -weight * (before + after) / own, mask=inside)
    tl.store(to + 2, tl.where(has_after, weight * inverse_after, 0.0), mask=inside)


@triton.jit
def loop_similarity_bwd_kernel(
    table_ptr, out_table_ptr, chains_ptr, factors_ptr, grad_ptr, num_ranges,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """chains as in forward, and the group; an address of 0 in `out_table` is a gradient that nobody wants."""
    chain = chains_ptr + tl.program_id(1) * 5
    first = tl.load(chain)
    distance = tl.load(chain + 1)
    length = tl.load(chain + 2)
    size = tl.load(chain + 3)
    grad = tl.load(grad_ptr + tl.load(chain + 4)).to(tl.float64)
    for part in range(tl.program_id(0), num_ranges, tl.num_programs(0)):
        at = (tl.zeros([BLOCK], tl.int64) + part) * BLOCK + tl.arange(0, BLOCK)
        before = tl.zeros([BLOCK], tl.float32)
        now = tl.load(_address(table_ptr, first, TYPE, ALIGNED) + at, mask=at < size, other=0.0).to(tl.float32)
        for i in range(length):
            tensor = first + i * distance
            # Behind the last one nothing is loaded.
            steps = tl.minimum(length - i, 2) - 1
            following = _address(table_ptr, tensor + steps * distance, TYPE, ALIGNED)
            after = tl.load(following + at, mask=at < steps * size, other=0.0).to(tl.float32)
            of_before = (tl.load(factors_ptr + tensor * 3) * grad).to(tl.float32)
            of_now = (tl.load(factors_ptr + tensor * 3 + 1) * grad).to(tl.float32)
            of_after = (tl.load(factors_ptr + tensor * 3 + 2) * grad).to(tl.float32)
            out = _address(out_table_ptr, tensor, TYPE, ALIGNED)
            wanted_size = tl.where(tl.load(out_table_ptr + tensor) != 0, size, 0)
            grad_now = of_before * before + of_now * now + of_after * after
            tl.store(out + at, grad_now.to(TYPE), mask=at < wanted_size)
            before = now
            now = after


def _chains(tensors: Sequence[Tensor], layers: Sequence[int], block: int) -> dict[torch.dtype, list[list[int]]]:
    """By dtype: first tensor, distance, number of tensors, elements, group."""
    found: dict[torch.dtype, list[list[int]]] = {}
    first = 0
    for group, count in enumerate(layers):
        like = tensors[first]
        rows = found.setdefault(like.dtype, [])
        rows += [[first + j, block, count // block, like.numel(), group] for j in range(block)]
        first += count
    return found


def _table(rows: Sequence[Any], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(like.device, non_blocking=True)


def _addresses(tensors: Sequence[Tensor]) -> tuple[list[int], bool]:
    found = [t.data_ptr() if t.numel() else 0 for t in tensors]
    return found, all(address % 16 == 0 for address in found)


def _ranges(tensors: Sequence[Tensor]) -> int:
    return max(1, triton.cdiv(max(t.numel() for t in tensors), BLOCK))


def forward(tensors: Sequence[Tensor], layers: Sequence[int], block: int) -> tuple[Tensor, Tensor]:
    like, num_ranges = tensors[0], _ranges(tensors)
    values = like.new_empty(len(layers), dtype=torch.float32)
    factors = like.new_empty((len(tensors), 3), dtype=torch.float64)
    sums = like.new_empty((len(tensors), num_ranges, 2), dtype=torch.float32)
    addresses, aligned = _addresses(tensors)
    table = _table(addresses, like)
    with torch.cuda.device_of(like):
        for dtype, rows in _chains(tensors, layers, block).items():
            loop_similarity_fwd_kernel[(min(PROGRAMS, num_ranges), len(rows))](
                table, _table([row[:4] for row in rows], like), sums, num_ranges, TYPE=_TYPES[dtype], ALIGNED=aligned,
                BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        firsts = [sum(layers[:g]) for g in range(len(layers))]
        loop_similarity_finish_kernel[(len(layers),)](
            sums.sum(1, dtype=torch.float64), _table(list(zip(firsts, layers)), like), values, factors, block,
            LAYERS=triton.next_power_of_2(max(layers)), num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return values, factors


def backward(
    tensors: Sequence[Tensor], factors: Tensor, grad_values: Tensor, layers: Sequence[int], block: int,
    wanted: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    like, num_ranges = tensors[0], _ranges(tensors)
    grads = [torch.empty_like(t) if w else t.new_empty(0) for t, w in zip(tensors, wanted)]
    addresses, aligned = _addresses(tensors)
    out, out_aligned = _addresses(grads)
    table, out_table = _table(addresses, like), _table(out, like)
    with torch.cuda.device_of(like):
        for dtype, rows in _chains(tensors, layers, block).items():
            loop_similarity_bwd_kernel[(min(PROGRAMS, num_ranges), len(rows))](
                table, out_table, _table(rows, like), factors, grad_values, num_ranges, TYPE=_TYPES[dtype],
                ALIGNED=aligned and out_aligned, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return grads


def _both(name: str, kind: Any) -> dict[str, tuple]:
    constants = {"TYPE": kind, "ALIGNED": True, "BLOCK": BLOCK}
    tables = {"table_ptr": "*i64", "chains_ptr": "*i64"}
    backward_tables = {**tables, "out_table_ptr": "*i64", "factors_ptr": "*fp64", "grad_ptr": "*fp32"}
    return {
        f"fwd_{name}": (
            loop_similarity_fwd_kernel, {**tables, "sums_ptr": "*fp32", "num_ranges": "i32"}, constants, WARPS
        ),
        f"bwd_{name}": (loop_similarity_bwd_kernel, {**backward_tables, "num_ranges": "i32"}, constants, WARPS),
    }  # fmt: skip


COMPILE_CASES = {
    **_both("fp32", tl.float32),
    **_both("bf16", tl.bfloat16),
    "finish_32": (
        loop_similarity_finish_kernel,
        {"sums_ptr": "*fp64", "groups_ptr": "*i64", "values_ptr": "*fp32", "factors_ptr": "*fp64", "block": "i32"},
        {"LAYERS": 32},
        1,
    ),
}
