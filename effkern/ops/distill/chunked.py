"""The chunk driver: products, row pass, products, one chunk of rows at a time; N x V never exists.

N rows, C rows of a chunk, V vocabulary, D and Dt hidden sizes of student and teacher
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill import ceilings, cost, gemm, huge_pages, teachers
from effkern.ops.distill.reference import reference_rows
from effkern.ops.distill.rows import RowOptions, Rows
from effkern.ops.distill.teachers import Source
from effkern.ops.distill.types import DistillStats

NUM_STATS = len(DistillStats._fields)


class Inputs(NamedTuple):
    """Tensors of the loss, as the driver takes them. `hidden` and `weight` are in the type of the products."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    labels_N: Tensor
    scale_N: Tensor
    omega_N: Tensor
    teacher: Source
    weight_grad_VD: Tensor | None = None
    """A float32 tensor that the gradient of the weight is added to, instead of a new one."""
    weight_grad_dtype: torch.dtype = torch.float32
    """Type in which the gradient of the weight leaves the op: a single chunk writes it at once."""


def chunk_bytes(device: torch.device) -> int:
    """Default byte budget of one V-wide chunk buffer on `device`: 32 MiB on a CPU, 1/64 of a GPU's memory."""
    if device.type == "cuda":
        return _cuda_chunk_bytes(device.index if device.index is not None else torch.cuda.current_device())
    return ceilings.CPU_CHUNK_BYTES


@cache
def _cuda_chunk_bytes(index: int) -> int:
    return torch.cuda.get_device_properties(index).total_memory // 64


def chunk_rows(num_rows: int, vocab: int, dim: int, element_bytes: int, budget: int) -> int:
    """Rows per chunk for products that only read: at most max(1024, 2 D), within `budget`, in chunks of one size."""
    problem = cost.Problem(num_rows, vocab, dim, element_bytes=element_bytes)
    return cost.balanced(num_rows, cost.rule_rows(problem, budget))


def row_pass(impl: str) -> Callable[[Rows, torch.dtype | None, RowOptions], Tensor | None]:
    """The row pass of an implementation."""
    if impl == "reference":
        return reference_rows
    if impl == "cpp":
        from effkern.ops.distill.cpp import cpp_rows

        return cpp_rows
    from effkern.ops.distill.triton import triton_rows

    return triton_rows


def kept_rows(labels_N: Tensor, ignore_index: int, num_kept: int | None) -> Tensor | None:
    """Indices of the rows that count, so that the others cost no product; None: all, or not known without waiting.

    On a GPU their number would have to be read back, so there the caller has to know it.
    """
    if num_kept is None:
        if labels_N.device.type != "cpu":
            return None
        index = (labels_N != ignore_index).nonzero().squeeze(1)
        return None if index.shape[0] == labels_N.shape[0] else index
    if num_kept == labels_N.shape[0]:
        return None
    return torch.argsort(labels_N == ignore_index, stable=True)[:num_kept]


def run(
    inputs: Inputs,
    options: RowOptions,
    vocab: int,
    impl: str,
    needs: tuple[bool, bool, bool],
    index_M: Tensor | None,
    step: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Statistics [13, N] and the gradients of sum_n scale_n loss_n.

    Args:
        vocab: entries that count; the rest of `weight` gets a zero gradient.
        needs: which of (hidden, weight, bias) get a gradient; without any, no gradient work is done.
        index_M: the rows that count (`kept_rows`), or None for all.
        step: rows per chunk.

    Returns:
        stats, grad_hidden (type of `hidden`), grad_weight and grad_bias (float32, or float64). grad_weight is None
        if it was added to `weight_grad_VD`.
    """
    x = inputs
    pass_over = row_pass(impl)
    dtype, device = x.hidden_ND.dtype, x.hidden_ND.device
    acc = gemm.accumulator_dtype(dtype)
    need_hidden, need_weight, need_bias = needs
    grad_dtype = dtype if any(needs) else None
    weight_VD = x.weight_VD[:vocab]
    bias_V = None if x.bias_V is None else x.bias_V[:vocab].to(acc).contiguous()
    source = teachers.prepare(x.teacher)
    num_rows = x.hidden_ND.shape[0] if index_M is None else index_M.shape[0]
    # Rows that do not count but are still there are cleared: 0 * inf would reach the weight gradient.
    clear = index_M is None and device.type != "cpu"

    stats_SN = torch.zeros(NUM_STATS, x.hidden_ND.shape[0], dtype=acc, device=device)
    grad_hidden = grad_weight = grad_bias = None
    if need_hidden:
        make = torch.empty_like if index_M is None else torch.zeros_like
        grad_hidden = make(x.hidden_ND, memory_format=torch.contiguous_format)
    if need_weight and x.weight_grad_VD is None:
        # One chunk has nothing to accumulate: its product is rounded once, to the type in which it leaves.
        single = step >= num_rows and x.weight_grad_dtype == dtype
        grad_weight = huge_pages.empty(x.weight_VD.shape, dtype if single else acc, device)
        grad_weight[vocab if num_rows else 0 :] = 0
    if need_bias:
        grad_bias = torch.zeros(x.weight_VD.shape[0], dtype=acc, device=device)
    total_VD = x.weight_grad_VD if need_weight and x.weight_grad_VD is not None else grad_weight

    def chunk(n: int, z: Tensor | None, u: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Rows n, n + 1, ...; takes and returns buffers of former logits, where the library can write into them."""
        part = slice(n, min(n + step, num_rows))
        index_C = None if index_M is None else index_M[part]

        def pick(rows: Tensor) -> Tensor:
            return rows[part] if index_C is None else rows.index_select(0, index_C)

        labels_C, scale_C = pick(x.labels_N).contiguous(), pick(x.scale_N)
        hidden_CD = pick(x.hidden_ND)
        if clear:
            hidden_CD = torch.where((labels_C != options.ignore_index)[:, None], hidden_CD, 0)
        z = gemm.logits(hidden_CD, weight_VD, z)
        teacher = teachers.rows(source, pick, labels_C, vocab, u)
        stats_SC = stats_SN[:, part] if index_C is None else stats_SN.new_empty(NUM_STATS, labels_C.shape[0])
        tensors = Rows(z, *teacher, bias_V, labels_C, scale_C, pick(x.omega_N), stats_SC)
        grad_CV = pass_over(tensors, grad_dtype, options)
        if index_C is not None:
            stats_SN.index_copy_(1, index_C, stats_SC)
        if grad_CV is not None:
            if grad_hidden is not None:
                out_CD = grad_hidden[part] if index_C is None else torch.empty_like(hidden_CD)
                gemm.hidden_grad(grad_CV, weight_VD, out_CD)
                if index_C is not None:
                    grad_hidden.index_copy_(0, index_C, out_CD)
            if total_VD is not None:
                weighed_CD = torch.where((scale_C != 0)[:, None], hidden_CD, 0)
                first = n == 0 and x.weight_grad_VD is None
                gemm.add_weight_grad(total_VD[:vocab], grad_CV, weighed_CD, first=first)
            if grad_bias is not None:
                gemm.add_bias_grad(grad_bias[:vocab], grad_CV)
        reusable = source.kind == "hidden" and gemm.writes_into_buffer(source.tensors[0])
        return (z if gemm.writes_into_buffer(hidden_CD) else None), (teacher.dense_CV if reusable else None)

    buffers: tuple[Tensor | None, Tensor | None] = (None, None)
    for n in range(0, num_rows, step):
        buffers = chunk(n, *buffers)
    return stats_SN, grad_hidden, grad_weight, grad_bias
