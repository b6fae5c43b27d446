"""The loss in slices of the vocabulary, one after the other: the logits of a slice twice, and nothing that is V x D.

    M rows that count, B entries of a slice, V vocabulary, D and Dt hidden sizes of student and teacher

The first sweep gathers each row's statistics, the second one has the gradients: a slice of the weight's gradient is
written once, in the type in which it leaves, where chunks of rows would keep V x D accumulators. It costs the logits
of both models once more. For small batches over large vocabularies, where memory is the limit.

The row pass over a slice is that of the vocabulary-parallel loss, with the slices in the place of the ranks.
"""

from typing import Any

import torch
from torch import Tensor

from effkern.ops.distill import chunked, gemm, teachers
from effkern.ops.distill.parallel import chunks, rows
from effkern.ops.distill.parallel.slices import Columns, RawSlice, prepare
from effkern.ops.distill.rows import RowOptions
from effkern.ops.distill.teachers import Source

# Their sums over slices can be merged as they come; the others need the maxima of all slices first.
DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "mse", "cosine")


def buffers(device: torch.device) -> int:
    """Slice-wide float buffers of the row pass beside logits and gradient: eager, or fused by torch.compile."""
    return 2 if device.type == "cuda" else 15


def covers(options: RowOptions, source: Source) -> bool:
    """Whether the loss can be had this way."""
    return source.kind != "table" and (source.kind in ("none", "sparse") or options.divergence in DIVERGENCES)


def _slice_of(source: Source, part: slice) -> Source:
    if source.kind == "rows":
        return source._replace(tensors=(source.tensors[0][:, part],))
    if source.kind == "hidden":
        hidden, *head = source.tensors
        return source._replace(tensors=(hidden, *(x[part] for x in head)))
    return source


def merge(
    old: tuple[Columns, Columns] | None, new: tuple[Columns, Columns], options: RowOptions
) -> tuple[Columns, Columns]:
    """Maxima and sums of two parts of the vocabulary; sums are relative to the maxima, so they move with them."""
    if old is None:
        return new
    t_p = 1.0 if options.teacher == "logprobs" else options.teacher_temperature
    top = {name: torch.maximum(old[0][name], new[0][name]) for name in new[0]}
    total = {name: torch.zeros_like(column) for name, column in new[1].items()}
    for part_top, part in (old, new):
        # A part of -inf has nothing to move.
        down = {name: torch.where(top[name] > -torch.inf, part_top[name] - top[name], 0.0) for name in top}
        scale = {"z1": down["z"].exp(), "z": (down["z"] / options.temperature).exp()}
        if "u" in down:
            scale["u"] = (down["u"] / t_p).exp()
        for name, column in part.items():
            if name == "gap":
                mass = part.get("z", part["z1"])
                shift = down["z"] / options.temperature - down["u"] / t_p
                column = torch.where(mass > 0, column + mass * shift, 0.0)
            # These two are sums of exp(z / T), too; what has no scale is not relative to anything.
            factor = scale["z"] if name in ("gap", "outside") else scale.get(name, 1.0)
            total[name] = total[name] + column * factor
    return top, total


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a b, where the accumulators may be wider than the factors."""
    if a.dtype == total.dtype and first:
        torch.mm(a, b, out=total)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)


def run(
    inputs: chunked.Inputs,
    options: RowOptions,
    vocab: int,
    needs: tuple[bool, bool, bool],
    index_M: Tensor | None,
    columns: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What `chunked.run` returns, from slices of `columns` entries; see there.

    Memory beyond inputs and gradients: logits, teacher's logits and logit gradient of one slice, M x B each (PyTorch's
    row pass: some fifteen of them), and M x D accumulators where products are in half precision.
    """
    x = inputs
    dtype, device = x.hidden_ND.dtype, x.hidden_ND.device
    acc = gemm.accumulator_dtype(dtype)

    def pick(given: Tensor) -> Tensor:
        return given if index_M is None else given.index_select(0, index_M)

    labels, scale, omega = pick(x.labels_N), pick(x.scale_N), pick(x.omega_N)
    hidden_MD = pick(x.hidden_ND)
    if index_M is None and device.type != "cpu":
        hidden_MD = torch.where((labels != options.ignore_index)[:, None], hidden_MD, 0)
    weighed_MD = torch.where((scale != 0)[:, None], hidden_MD, 0)
    compiled = device.type == "cuda"
    call: Any = chunks.compiled_phase if compiled else lambda phase: phase

    def slice_at(v: int) -> Any:
        part = slice(v, min(v + columns, vocab))
        z = gemm.logits(hidden_MD, x.weight_VD[part], None)
        given = teachers.rows(_slice_of(x.teacher, part), pick, labels, part.stop - v, None)
        bias = None if x.bias_V is None else x.bias_V[part].to(acc)
        raw = RawSlice(z, *given, bias, labels, scale, omega, v, vocab)
        return raw if compiled else prepare(raw, options)

    found: tuple[Columns, Columns] | None = None
    for v in range(0, vocab, columns):
        here = slice_at(v)
        top = call(rows.maxima)(here, options)
        found = merge(found, (top, call(rows.sums)(here, top, options)), options)
    assert found is not None

    need_hidden, need_weight, need_bias = needs
    grad_dtype = dtype if any(needs) else None
    shares = torch.zeros(chunked.NUM_STATS, labels.shape[0], dtype=acc, device=device)
    total_VD = x.weight_grad_VD if need_weight else None
    grad_weight = grad_bias = grad_hidden = None
    if need_weight and total_VD is None:
        kind = dtype if x.weight_grad_dtype == dtype else acc
        total_VD = grad_weight = torch.zeros(x.weight_VD.shape, dtype=kind, device=device)
    if need_bias:
        grad_bias = torch.zeros(x.weight_VD.shape[0], dtype=acc, device=device)
    sum_MD = torch.empty(hidden_MD.shape, dtype=acc, device=device) if need_hidden else None
    for v in range(0, vocab, columns):
        part = slice(v, min(v + columns, vocab))
        grad_MB, share = call(rows.finish)(slice_at(v), *found, options, grad_dtype)
        shares += share
        if grad_MB is None:
            continue
        if sum_MD is not None:
            _add_product(sum_MD, grad_MB, x.weight_VD[part], first=v == 0)
        if total_VD is not None:
            gemm.add_weight_grad(total_VD[part], grad_MB, weighed_MD, first=x.weight_grad_VD is None)
        if grad_bias is not None:
            gemm.add_bias_grad(grad_bias[part], grad_MB)
    shares[chunks.AGREEMENT].clamp_(max=1)
    stats_SN, grad_hidden = shares, None if sum_MD is None else sum_MD.to(dtype)
    if index_M is not None:
        stats_SN = torch.zeros(chunked.NUM_STATS, x.hidden_ND.shape[0], dtype=acc, device=device)
        stats_SN.index_copy_(1, index_M, shares)
        if grad_hidden is not None:
            grad_hidden = torch.zeros_like(x.hidden_ND).index_copy_(0, index_M, grad_hidden)
    return stats_SN, grad_hidden, grad_weight, grad_bias
