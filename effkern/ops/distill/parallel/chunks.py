"""The chunk driver over a slice of the vocabulary: products, row pass with reductions, products; no N x v.

N rows, C rows of a chunk, V vocabulary, v entries of it in this slice, D and Dt hidden sizes of student and teacher
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill import chunked, gemm, teachers
from effkern.ops.distill.parallel import rows
from effkern.ops.distill.parallel.slices import Columns, RawSlice, prepare
from effkern.ops.distill.rows import RowOptions
from effkern.ops.distill.teachers import TeacherRows
from effkern.ops.distill.types import DistillStats

AGREEMENT = DistillStats._fields.index("agreement")


def _same(x: Tensor) -> Tensor:
    return x


class Reductions(NamedTuple):
    """What the ranks do together, each from tensor to tensor. As they stand here: one process with all of V."""

    max: Callable[[Tensor], Tensor] = _same
    sum: Callable[[Tensor], Tensor] = _same
    gather_rows: Callable[[Tensor], Tensor] = _same
    """The rows of all ranks, of a tensor whose rows are spread over them."""
    scatter_rows: Callable[[Tensor], Tensor] = _same
    """The sum over the ranks, of which each keeps its rows."""


class Layout(NamedTuple):
    """Which entries of the vocabulary this rank has, padding left out."""

    start: int
    size: int
    vocab: int
    """Entries of the whole vocabulary that count."""
    widest: int
    """Entries of the widest slice: it decides on the chunks of all."""


def _together(columns: Columns, reduce: Callable[[Tensor], Tensor]) -> Columns:
    """One reduction of all columns."""
    flat = reduce(torch.cat([column.reshape(-1) for column in columns.values()]))
    parts = flat.split([column.numel() for column in columns.values()])
    return {name: part.view(column.shape) for (name, column), part in zip(columns.items(), parts)}


# The phases from the raw logits on, so that a compiler fuses what comes before them. Each is a function of its own:
# torch.compile counts variants per function, and runs those beyond its limit (8) as they are.
def _raw_maxima(raw: RawSlice, options: RowOptions) -> Columns:
    return rows.maxima(prepare(raw, options), options)


def _raw_sums(raw: RawSlice, top: Columns, options: RowOptions) -> Columns:
    return rows.sums(prepare(raw, options), top, options)


def _raw_weight_sum(raw: RawSlice, top: Columns, total: Columns, options: RowOptions) -> Columns:
    return rows.weight_sum(prepare(raw, options), top, total, options)


def _raw_finish(
    raw: RawSlice, top: Columns, total: Columns, options: RowOptions, grad_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor]:
    return rows.finish(prepare(raw, options), top, total, options, grad_dtype)


RAW: dict[Callable[..., Any], Callable[..., Any]] = {
    rows.maxima: _raw_maxima,
    rows.sums: _raw_sums,
    rows.weight_sum: _raw_weight_sum,
    rows.finish: _raw_finish,
}


@cache
def compiled_phase(phase: Callable[..., Any]) -> Callable[..., Any]:
    """A phase of the row pass from the raw logits, fused by torch.compile."""
    return torch.compile(RAW[phase])


def row_pass(
    raw: RawSlice, grad_dtype: torch.dtype | None, options: RowOptions, reductions: Reductions, compiled: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradient on the slice and shares of the statistics [13, C], of one chunk: two or three small reductions."""
    if compiled:
        given: Any = raw
        call: Callable[..., Any] = compiled_phase
    else:
        # Plain PyTorch keeps the prepared logits; recomputing them in every phase pays off only where they fuse.
        given, call = prepare(raw, options), _same
    top = _together(call(rows.maxima)(given, options), reductions.max)
    total = _together(call(rows.sums)(given, top, options), reductions.sum)
    if rows.three_passes(options, raw.teacher_Rv is not None):
        total |= _together(call(rows.weight_sum)(given, top, total, options), reductions.sum)
    return call(rows.finish)(given, top, total, options, grad_dtype)


def _teacher(source: teachers.Source, pick: teachers.Pick, labels_C: Tensor, layout: Layout, buffer: Tensor | None) -> (
    TeacherRows
):  # fmt: skip
    """The teacher's part of a chunk, cut to this slice."""
    part = slice(layout.start, layout.start + layout.size)
    if source.kind == "hidden" and layout.size == 0:
        return TeacherRows(source.tensors[0].new_empty(labels_C.shape[0], 0))
    given = teachers.rows(source, pick, labels_C, layout.size, buffer)
    if source.kind == "rows" and given.dense_CV is not None:
        return TeacherRows(given.dense_CV[:, : layout.size])
    if source.kind == "table" and given.dense_CV is not None:
        return TeacherRows(given.dense_CV[:, part])
    return given


def run(
    inputs: chunked.Inputs,
    options: RowOptions,
    layout: Layout,
    reductions: Reductions,
    needs: tuple[bool, bool, bool],
    *,
    budget: int,
    num_kept: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Statistics [13, N] and the gradients of sum_n scale_n loss_n, as `chunked.run`, where every rank has a slice.

    `inputs` hold this rank's slice of weight, bias and teacher; the gradient of `hidden` is the sum over all ranks.
    `budget`: bytes of one chunk buffer of the widest slice, the same on every rank.
    """
    x = inputs
    v = layout.size
    hidden_ND = reductions.gather_rows(x.hidden_ND)
    dtype, device = hidden_ND.dtype, hidden_ND.device
    acc = gemm.accumulator_dtype(dtype)
    need_hidden, need_weight, need_bias = needs
    weight_vD = x.weight_VD[:v]
    bias_v = None if x.bias_V is None else x.bias_V[:v].to(acc)
    source = teachers.prepare(x.teacher)
    index_M = chunked.kept_rows(x.labels_N, options.ignore_index, num_kept)
    num_rows = hidden_ND.shape[0] if index_M is None else index_M.shape[0]
    clear = index_M is None and device.type != "cpu"

    shares_SN = torch.zeros(chunked.NUM_STATS, hidden_ND.shape[0], dtype=acc, device=device)
    grad_hidden = torch.zeros_like(hidden_ND, memory_format=torch.contiguous_format) if need_hidden else None
    total_vD = grad_weight = grad_bias = None
    if need_weight:
        total_vD = x.weight_grad_VD
        if total_vD is None:
            total_vD = grad_weight = torch.zeros(x.weight_VD.shape, dtype=acc, device=device)
    if need_bias:
        grad_bias = torch.zeros(x.weight_VD.shape[0], dtype=acc, device=device)

    step = chunked.chunk_rows(num_rows, layout.widest, hidden_ND.shape[1], acc.itemsize, budget)
    z_buffer: Tensor | None = None
    u_buffer: Tensor | None = None
    for n in range(0, num_rows, step):
        part = slice(n, min(n + step, num_rows))
        index_C = None if index_M is None else index_M[part]

        def pick(rows: Tensor, part: slice = part, index_C: Tensor | None = index_C) -> Tensor:
            return rows[part] if index_C is None else rows.index_select(0, index_C)

        labels_C, scale_C = pick(x.labels_N), pick(x.scale_N)
        hidden_CD = pick(hidden_ND)
        if clear:
            hidden_CD = torch.where((labels_C != options.ignore_index)[:, None], hidden_CD, 0)
        z_Cv = gemm.logits(hidden_CD, weight_vD, z_buffer) if v else hidden_CD.new_empty(hidden_CD.shape[0], 0).to(acc)
        teacher = _teacher(source, pick, labels_C, layout, u_buffer)
        raw = RawSlice(z_Cv, *teacher, bias_v, labels_C, scale_C, pick(x.omega_N), layout.start, layout.vocab)
        grad_Cv, shares_SC = row_pass(raw, dtype if any(needs) else None, options, reductions, compiled)
        shares_SN[:, part if index_C is None else index_C] = shares_SC
        if grad_Cv is not None and v:
            if grad_hidden is not None:
                grad_hidden_CD = torch.empty_like(hidden_CD)
                gemm.hidden_grad(grad_Cv, weight_vD, grad_hidden_CD)
                grad_hidden[part if index_C is None else index_C] = grad_hidden_CD
            if total_vD is not None:
                weighed_CD = torch.where((scale_C != 0)[:, None], hidden_CD, 0)
                gemm.add_weight_grad(total_vD[:v], grad_Cv, weighed_CD, first=False)
            if grad_bias is not None:
                gemm.add_bias_grad(grad_bias[:v], grad_Cv)
        z_buffer = z_Cv if v and gemm.writes_into_buffer(hidden_CD) else None
        if source.kind == "hidden" and v and gemm.writes_into_buffer(source.tensors[0]):
            u_buffer = teacher.dense_CV

    stats_SN = reductions.sum(shares_SN)
    stats_SN[AGREEMENT].clamp_(max=1)
    if grad_hidden is not None:
        grad_hidden = reductions.scatter_rows(grad_hidden)
    return stats_SN, grad_hidden, grad_weight, grad_bias
