"""The tall passes of LoRA-RITE in Triton: one launch each for all factors of a group, whatever their rows and layout.

A program takes a range of rows of one factor and writes the sums of its products to a slot of its own: the sums do not
depend on the order in which programs run. A program's products are float32; where a factor has no full rank everything
is float64. Tensors come by a table of addresses, which goes to the device when an address has changed; in a CUDA graph
it may not. No GPU has timed it yet.

Bytes: the first pass reads G, the second reads X, M and G and writes X and M: six words per element.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern import native
from effkern.ops import addresses

# From 32 on the four matrices and the sums of a block do not fit the registers of a program.
MAX_RANK = 16
# Rows of a program, in whole blocks.
TASK_ROWS = 1024


class Launch(NamedTuple):
    rows: int
    """Of a block."""
    warps: int
    precision: str


LAUNCHES = {16: Launch(32, 4, "ieee")}


@triton.jit
def _pointer(table_ptr, i):
    return tl.multiple_of(tl.load(table_ptr + i).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _load(ptr, row, num_rows, rank, WIDE: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr):
    """[ROWS, RANK] float32, 0 outside. Offsets within a block are 32-bit: they are most of the registers."""
    i = tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    left = (num_rows - row).to(tl.int32)
    if WIDE:
        across = k[:, None] * num_rows.to(tl.int32) + i[None, :]
        turned = tl.load(ptr + row + across, mask=(k[:, None] < rank) & (i[None, :] < left), other=0.0)
        x = tl.trans(turned)
    else:
        along = i[:, None] * rank + k[None, :]
        x = tl.load(ptr + row * rank + along, mask=(i[:, None] < left) & (k[None, :] < rank), other=0.0)
    return x


@triton.jit
def _store(ptr, x, row, num_rows, rank, WIDE: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr):
    i = tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    left = (num_rows - row).to(tl.int32)
    if WIDE:
        across = k[:, None] * num_rows.to(tl.int32) + i[None, :]
        tl.store(ptr + row + across, tl.trans(x), mask=(k[:, None] < rank) & (i[None, :] < left))
    else:
        along = i[:, None] * rank + k[None, :]
        tl.store(ptr + row * rank + along, x, mask=(i[:, None] < left) & (k[None, :] < rank))


@triton.jit
def _matrix(ptr, rank, RANK: tl.constexpr):
    k = tl.arange(0, RANK)
    inside = (k[:, None] < rank) & (k[None, :] < rank)
    return tl.load(ptr + k[:, None] * rank + k[None, :], mask=inside, other=0.0)


@triton.jit
def _single(ptr, rank, RANK: tl.constexpr):
    """In the loop, from the first-level cache: held through it, four matrices would be all registers there are."""
    return _matrix(ptr, rank, RANK).to(tl.float32)


@triton.jit
def _store_matrix(ptr, x, rank, RANK: tl.constexpr):
    k = tl.arange(0, RANK)
    inside = (k[:, None] < rank) & (k[None, :] < rank)
    tl.store(ptr + k[:, None] * rank + k[None, :], x, mask=inside)


@triton.jit
def _gram_rows(
    ptr, w_ptr, slot, begin, end, num_rows, rank,
    WIDE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    if EXACT:
        total = tl.zeros([RANK, RANK], tl.float64)
        for row in range(begin, end, ROWS):
            x = _load(ptr, row, num_rows, rank, WIDE, ROWS, RANK).to(tl.float64)
            total += tl.dot(tl.trans(x), x, out_dtype=tl.float64)
        _store_matrix(slot, total, rank, RANK)
    else:
        w = _matrix(w_ptr, rank, RANK).to(tl.float32)
        single = tl.zeros([RANK, RANK], tl.float32)
        for row in range(begin, end, ROWS):
            y = tl.dot(_load(ptr, row, num_rows, rank, WIDE, ROWS, RANK), w, input_precision=PRECISION)
            single += tl.dot(tl.trans(y), y, input_precision=PRECISION)
        _store_matrix(slot, single.to(tl.float64), rank, RANK)


@triton.jit
def lora_rite_gram_kernel(
    table_ptr, tasks_ptr, factors_ptr, whiten_ptr, partial_ptr, rank,
    OTHER: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """partial [tasks, rank^2]. tasks: factor, first row, end; factors: rows, wide. OTHER: whiten of the neighbour."""
    task = tl.program_id(0).to(tl.int64)
    factor = tl.load(tasks_ptr + task * 3)
    begin = tl.load(tasks_ptr + task * 3 + 1)
    end = tl.load(tasks_ptr + task * 3 + 2)
    num_rows = tl.load(factors_ptr + factor * 2)
    ptr = _pointer(table_ptr, factor)
    square = rank * rank
    slot = partial_ptr + task * square
    own = factor ^ 1 if OTHER else factor
    w_ptr = whiten_ptr + own * square
    # Each layout has code of its own: within a loop, both would hold registers.
    if tl.load(factors_ptr + factor * 2 + 1) != 0:
        _gram_rows(ptr, w_ptr, slot, begin, end, num_rows, rank, True, EXACT, PRECISION, ROWS, RANK)
    else:
        _gram_rows(ptr, w_ptr, slot, begin, end, num_rows, rank, False, EXACT, PRECISION, ROWS, RANK)


@triton.jit
def _update_rows(
    x_ptr, m_ptr, g_ptr, carry_ptr, take_ptr, apply_ptr, shrink, whiten_ptr, slot, begin, end, num_rows, rank, at,
    WIDE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    square = rank * rank
    if EXACT:
        gram = tl.zeros([RANK, RANK], tl.float64)
        cross = tl.zeros([RANK, RANK], tl.float64)
        size = tl.zeros([RANK], tl.float64)
        for row in range(begin, end, ROWS):
            m = _load(m_ptr, row, num_rows, rank, WIDE, ROWS, RANK).to(tl.float64)
            g = _load(g_ptr, row, num_rows, rank, WIDE, ROWS, RANK).to(tl.float64)
            # Matrices anew for each block of rows: three float64 ones at once are too much shared memory.
            moment = tl.dot(m, _matrix(carry_ptr + at, rank, RANK), out_dtype=tl.float64)
            moment += tl.dot(g, _matrix(take_ptr + at, rank, RANK), out_dtype=tl.float64)
            kept = moment.to(tl.float32)
            _store(m_ptr, kept, row, num_rows, rank, WIDE, ROWS, RANK)
            before = _load(x_ptr, row, num_rows, rank, WIDE, ROWS, RANK).to(tl.float64)
            step = tl.dot(kept.to(tl.float64), _matrix(apply_ptr + at, rank, RANK), out_dtype=tl.float64)
            stored = (shrink * before - step).to(tl.float32)
            _store(x_ptr, stored, row, num_rows, rank, WIDE, ROWS, RANK)
            after = tl.trans(stored.to(tl.float64))
            gram += tl.dot(after, stored.to(tl.float64), out_dtype=tl.float64)
            cross += tl.dot(after, before, out_dtype=tl.float64)
            size += tl.sum(after * after, 1)
        _store_matrix(slot, gram, rank, RANK)
        _store_matrix(slot + square, cross, rank, RANK)
        tl.store(slot + 2 * square, tl.sum(size, 0))
    else:
        keep = shrink.to(tl.float32)
        gram_single = tl.zeros([RANK, RANK], tl.float32)
        cross_single = tl.zeros([RANK, RANK], tl.float32)
        size_single = tl.zeros([RANK], tl.float32)
        for row in range(begin, end, ROWS):
            m_single = _load(m_ptr, row, num_rows, rank, WIDE, ROWS, RANK)
            g_single = _load(g_ptr, row, num_rows, rank, WIDE, ROWS, RANK)
            x = _load(x_ptr, row, num_rows, rank, WIDE, ROWS, RANK)
            new = tl.dot(m_single, _single(carry_ptr + at, rank, RANK), input_precision=PRECISION)
            new += tl.dot(g_single, _single(take_ptr + at, rank, RANK), input_precision=PRECISION)
            _store(m_ptr, new, row, num_rows, rank, WIDE, ROWS, RANK)
            u = tl.dot(x, _single(whiten_ptr + at, rank, RANK), input_precision=PRECISION)
            moved = keep * x - tl.dot(new, _single(apply_ptr + at, rank, RANK), input_precision=PRECISION)
            _store(x_ptr, moved, row, num_rows, rank, WIDE, ROWS, RANK)
            y = tl.dot(moved, _single(whiten_ptr + at, rank, RANK), input_precision=PRECISION)
            turned = tl.trans(y)
            gram_single += tl.dot(turned, y, input_precision=PRECISION)
            cross_single += tl.dot(turned, u, input_precision=PRECISION)
            size_single += tl.sum(moved * moved, 0)
        _store_matrix(slot, gram_single.to(tl.float64), rank, RANK)
        _store_matrix(slot + square, cross_single.to(tl.float64), rank, RANK)
        tl.store(slot + 2 * square, tl.sum(size_single.to(tl.float64), 0))


@triton.jit
def lora_rite_update_kernel(
    table_ptr, tasks_ptr, factors_ptr, gate_ptr, carry_ptr, take_ptr, apply_ptr, shrink_ptr, whiten_ptr, exact_ptr,
    partial_ptr, rank, PRECISION: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """partial [tasks, 2 rank^2 + 1]: y^T y, y^T u, |X|^2. table: addresses of X, M, G of each factor."""
    task = tl.program_id(0).to(tl.int64)
    factor = tl.load(tasks_ptr + task * 3)
    begin = tl.load(tasks_ptr + task * 3 + 1)
    end = tl.load(tasks_ptr + task * 3 + 2)
    num_rows = tl.load(factors_ptr + factor * 2)
    x_ptr = _pointer(table_ptr, factor * 3)
    m_ptr = _pointer(table_ptr, factor * 3 + 1)
    g_ptr = _pointer(table_ptr, factor * 3 + 2)
    square = rank * rank
    at = factor * square
    shrink = tl.load(shrink_ptr + factor)
    gate = tl.load(gate_ptr)
    # A step that is skipped walks over no row.
    end = tl.where(gate - gate == 0.0, end, begin)
    slot = partial_ptr + task * (2 * square + 1)
    # Each layout and each precision has code of its own: within a loop, all would hold registers.
    wide = tl.load(factors_ptr + factor * 2 + 1) != 0
    if tl.load(exact_ptr + factor) != 0:
        if wide:
            _update_rows(
                x_ptr, m_ptr, g_ptr, carry_ptr, take_ptr, apply_ptr, shrink, whiten_ptr, slot, begin, end, num_rows,
                rank, at, True, True, PRECISION, ROWS, RANK,
            )  # fmt: skip
        else:
            _update_rows(
                x_ptr, m_ptr, g_ptr, carry_ptr, take_ptr, apply_ptr, shrink, whiten_ptr, slot, begin, end, num_rows,
                rank, at, False, True, PRECISION, ROWS, RANK,
            )  # fmt: skip
    else:
        if wide:
            _update_rows(
                x_ptr, m_ptr, g_ptr, carry_ptr, take_ptr, apply_ptr, shrink, whiten_ptr, slot, begin, end, num_rows,
                rank, at, True, False, PRECISION, ROWS, RANK,
            )  # fmt: skip
        else:
            _update_rows(
                x_ptr, m_ptr, g_ptr, carry_ptr, take_ptr, apply_ptr, shrink, whiten_ptr, slot, begin, end, num_rows,
                rank, at, False, False, PRECISION, ROWS, RANK,
            )  # fmt: skip


class Plan(NamedTuple):
    """How the rows of a group are cut; on the device."""

    tasks: Tensor
    factors: Tensor
    first: Tensor
    """[F + 1] int64: first task of each factor."""
    counts: list[int]
    rank: int
    block: int
    """Power of two that holds the rank."""


_PLANS: dict[tuple, Plan] = {}


def _plan(tensors: Sequence[Tensor], wide: Sequence[bool]) -> Plan:
    rank = tensors[0].shape[0 if wide[0] else 1]
    if rank > MAX_RANK:
        raise NotImplementedError(f"lora_rite: impl='triton' takes ranks up to {MAX_RANK}, got {rank}")
    rows = tuple(t.numel() // rank for t in tensors)
    key = (rows, tuple(wide), rank, tensors[0].device)
    if key in _PLANS:
        return _PLANS[key]
    tasks, counts = [], []
    for f, count in enumerate(rows):
        cuts = range(0, count, TASK_ROWS)
        tasks += [(f, begin, min(begin + TASK_ROWS, count)) for begin in cuts]
        counts.append(len(cuts))
    first = [sum(counts[:f]) for f in range(len(counts) + 1)]
    device = tensors[0].device
    plan = _PLANS[key] = Plan(
        torch.tensor(tasks, dtype=torch.int64, device=device),
        torch.tensor([(count, int(w)) for count, w in zip(rows, wide)], dtype=torch.int64, device=device),
        torch.tensor(first, dtype=torch.int64, device=device),
        counts,
        rank,
        max(16, triton.next_power_of_2(rank)),
    )
    return plan


def _table(tensors: Sequence[Tensor]) -> Tensor:
    found, device = [t.data_ptr() for t in tensors], tensors[0].device
    if any(address % 16 for address in found):
        raise ValueError("lora_rite: tensors must start at a multiple of 16 bytes for impl='triton'")
    return addresses.table(found, device)


def _gram_tiles(tensors: Sequence[Tensor], plan: Plan, whiten: Tensor | None, other: bool) -> Tensor:
    table, launch = _table(tensors), LAUNCHES[plan.block]
    partial = torch.empty((len(plan.tasks), plan.rank**2), dtype=torch.float64, device=table.device)
    with torch.cuda.device_of(table):
        lora_rite_gram_kernel[(len(plan.tasks),)](
            table, plan.tasks, plan.factors, partial if whiten is None else whiten, partial, plan.rank, OTHER=other,
            EXACT=whiten is None, PRECISION=launch.precision, ROWS=launch.rows, RANK=plan.block,
            num_warps=launch.warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return partial


def _sums(partial: Tensor, plan: Plan) -> Tensor:
    """[F, width], tasks of a factor added up in order."""
    return torch.stack([part.sum(0) for part in partial.split(plan.counts)])


def _compiled(device: torch.device) -> bool:
    return device.type == "cuda" and native.load("_C_cuda") is None


def _reduce(partial: Tensor, plan: Plan) -> Tensor:
    if not _compiled(partial.device):
        return _sums(partial, plan)
    rows = plan.factors[:, 0].double()
    return torch.ops.effkern.lora_rite_reduce(partial, plan.first, rows, plan.rank, 0.0)[0]


def gram(tensors: Sequence[Tensor], wide: Sequence[bool], whiten: Tensor | None) -> Tensor:
    """See stages.gram."""
    plan = _plan(tensors, wide)
    return _reduce(_gram_tiles(tensors, plan, whiten, False), plan).view(-1, plan.rank, plan.rank)


def unmagnified(
    grads: Sequence[Tensor], wide: Sequence[bool], whiten: Tensor, rows: Tensor, skip_rms: float
) -> tuple[Tensor, Tensor] | None:
    """Gram matrices by the other factor's whiten, and their traces: two launches; None without effkern._C_cuda."""
    if not _compiled(whiten.device):
        return None
    plan = _plan(grads, wide)
    partial = _gram_tiles(grads, plan, whiten, True)
    sums, traces = torch.ops.effkern.lora_rite_reduce(partial, plan.first, rows, plan.rank, skip_rms)
    return sums.view(-1, plan.rank, plan.rank), traces


def _update_tiles(factors, moments, grads, plan, gate, carry, take, apply, shrink, whiten, exact) -> Tensor:
    table = _table([t for three in zip(factors, moments, grads) for t in three])
    launch = LAUNCHES[plan.block]
    partial = torch.empty((len(plan.tasks), 2 * plan.rank**2 + 1), dtype=torch.float64, device=table.device)
    with torch.cuda.device_of(table):
        lora_rite_update_kernel[(len(plan.tasks),)](
            table, plan.tasks, plan.factors, gate, carry, take, apply, shrink, whiten, exact, partial, plan.rank,
            PRECISION=launch.precision, ROWS=launch.rows, RANK=plan.block, num_warps=launch.warps, num_stages=1,
            enable_fp_fusion=True,
        )  # fmt: skip
    return partial


def update_(factors, moments, grads, wide, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """See stages.update_."""
    plan = _plan(factors, wide)
    sums = _reduce(_update_tiles(factors, moments, grads, plan, *arguments), plan)
    square = plan.rank**2
    grams, crosses = (
        sums[:, k * square : (k + 1) * square].contiguous().view(-1, plan.rank, plan.rank) for k in range(2)
    )
    return grams, crosses, sums[:, -1].clone()


def advance_(factors, moments, grads, wide, update, whiten, transport, exact, single, tolerance) -> bool:
    """update_ and rebase_ in two launches; False, and nothing done, without effkern._C_cuda."""
    if not _compiled(whiten.device):
        return False
    plan = _plan(factors, wide)
    partial = _update_tiles(factors, moments, grads, plan, *(*update, whiten, exact))
    torch.ops.effkern.lora_rite_rebase_tiles_(
        partial, plan.first, update[0], whiten, transport, exact, single, tolerance
    )
    return True


def _cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    tables = {"table_ptr": "*i64", "tasks_ptr": "*i64", "factors_ptr": "*i64"}
    small = {f"{name}_ptr": "*fp64" for name in ("gate", "carry", "take", "apply", "shrink", "whiten")}
    for block, launch in LAUNCHES.items():
        options = {"num_warps": launch.warps, "num_stages": 1}
        constants = {"PRECISION": launch.precision, "ROWS": launch.rows, "RANK": block}
        signature = {**tables, "whiten_ptr": "*fp64", "partial_ptr": "*fp64", "rank": "i32:16"}
        for name, exact in (("gram", False), ("gram_exact", True)):
            flags = {**constants, "OTHER": not exact, "EXACT": exact}
            found[f"{name}_{block}"] = (lora_rite_gram_kernel, signature, flags, options)
        signature = {**tables, **small, "exact_ptr": "*i32", "partial_ptr": "*fp64", "rank": "i32:16"}
        found[f"update_{block}"] = (lora_rite_update_kernel, signature, constants, options)
    return found


COMPILE_CASES = _cases()
