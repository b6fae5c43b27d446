"""The chunk driver: products, row pass, products, one chunk of rows at a time; N x V never exists.

N rows, C rows of a chunk, V vocabulary, D and Dt hidden sizes of student and teacher
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill import gemm
from effkern.ops.distill.reference import reference_rows
from effkern.ops.distill.rows import RowOptions, Rows
from effkern.ops.distill.types import DistillStats

NUM_STATS = len(DistillStats._fields)

# Bytes of one V-wide chunk buffer on a CPU: 256 rows at V = 32000.
CPU_CHUNK_BYTES = 32 << 20


class Inputs(NamedTuple):
    """Tensors of the loss, as the driver takes them. `hidden` and `weight` are in the type of the products."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    labels_N: Tensor
    scale_N: Tensor
    omega_N: Tensor
    teacher_NV: Tensor | None
    teacher_hidden_NDt: Tensor | None
    teacher_weight_VDt: Tensor | None
    teacher_bias_V: Tensor | None


@cache
def _cuda_chunk_bytes(index: int) -> int:
    return torch.cuda.get_device_properties(index).total_memory // 64


def chunk_bytes(device: torch.device) -> int:
    """Default byte budget of one V-wide chunk buffer on `device`: 32 MiB on a CPU, 1/64 of a GPU's memory."""
    if device.type == "cuda":
        return _cuda_chunk_bytes(device.index if device.index is not None else torch.cuda.current_device())
    return CPU_CHUNK_BYTES


def chunk_rows(num_rows: int, vocab: int, dim: int, element_bytes: int, budget: int) -> int:
    """Rows per chunk: max(1024, 2 D) bounds the traffic of the weights per row, `budget` bounds the buffer.

    Chunks are of equal size up to rounding, so that the last one is no remnant.
    """
    wanted = max(1024, 2 * dim)
    allowed = max(1, budget // (vocab * element_bytes))
    if allowed > 32:
        allowed -= allowed % 32
    most = max(1, min(num_rows, wanted, allowed))
    num_chunks = -(-num_rows // most)
    return -(-num_rows // num_chunks) if num_chunks else most


def row_pass(impl: str) -> Callable[[Rows, torch.dtype | None, RowOptions], Tensor | None]:
    """The row pass of an implementation."""
    if impl == "reference":
        return reference_rows
    if impl == "cpp":
        from effkern.ops.distill.cpp import cpp_rows

        return cpp_rows
    from effkern.ops.distill.triton import triton_rows

    return triton_rows


def run(
    inputs: Inputs,
    options: RowOptions,
    vocab: int,
    impl: str,
    needs: tuple[bool, bool, bool],
    budget: int | None,
    teacher_cap: tuple[float, float | None],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Statistics [11, N] and the gradients of sum_n scale_n loss_n.

    Args:
        vocab: entries that count; the rest of `weight` gets a zero gradient.
        needs: which of (hidden, weight, bias) get a gradient; without any, no gradient work is done.
        budget: bytes of one V-wide buffer, or None for the device's default.
        teacher_cap: logit_scale and softcap of TeacherHidden.

    Returns:
        stats, grad_hidden (type of `hidden`), grad_weight and grad_bias (float32, or float64).
    """
    x = inputs
    pass_over = row_pass(impl)
    num_rows, dim = x.hidden_ND.shape
    weight_VD = x.weight_VD[:vocab]
    dtype = x.hidden_ND.dtype
    acc = gemm.accumulator_dtype(dtype)
    need_hidden, need_weight, need_bias = needs
    grad_dtype = dtype if any(needs) else None
    bias_V = None if x.bias_V is None else x.bias_V[:vocab].to(acc).contiguous()
    labels_N = x.labels_N.contiguous()
    kept_N = (labels_N != options.ignore_index)[:, None]
    weighed_N = kept_N & (x.scale_N != 0)[:, None]

    stats_SN = torch.zeros(NUM_STATS, num_rows, dtype=acc, device=x.hidden_ND.device)
    grad_hidden = torch.empty_like(x.hidden_ND, memory_format=torch.contiguous_format) if need_hidden else None
    grad_weight = torch.empty(x.weight_VD.shape, dtype=acc, device=x.hidden_ND.device) if need_weight else None
    grad_bias = torch.zeros(x.weight_VD.shape[0], dtype=acc, device=x.hidden_ND.device) if need_bias else None
    if grad_weight is not None:
        grad_weight[vocab if num_rows else 0 :] = 0
    if num_rows == 0:
        return stats_SN, grad_hidden, grad_weight, grad_bias

    limit = chunk_bytes(x.hidden_ND.device) if budget is None else budget
    step = chunk_rows(num_rows, vocab, dim, acc.itemsize, limit)

    def chunk(n: int, z: Tensor | None, u: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Rows n, n + 1, ...; takes and returns buffers of former logits, where the library can write into them."""
        part = slice(n, min(n + step, num_rows))
        # Rows that do not count are cleared: 0 * inf would reach the weight gradient.
        hidden_CD = torch.where(kept_N[part], x.hidden_ND[part], 0)
        z = gemm.logits(hidden_CD, weight_VD, z)
        if x.teacher_hidden_NDt is not None:
            u = teacher_logits(inputs, part, vocab, u, *teacher_cap)
        elif x.teacher_NV is not None:
            u = x.teacher_NV[part]
        tensors = Rows(z, u, bias_V, labels_N[part], x.scale_N[part], x.omega_N[part], stats_SN[:, part])
        grad_CV = pass_over(tensors, grad_dtype, options)
        if grad_CV is not None:
            if grad_hidden is not None:
                gemm.hidden_grad(grad_CV, weight_VD, grad_hidden[part])
            if grad_weight is not None:
                weighed_CD = torch.where(weighed_N[part], hidden_CD, 0)
                gemm.add_weight_grad(grad_weight[:vocab], grad_CV, weighed_CD, first=n == 0)
            if grad_bias is not None:
                gemm.add_bias_grad(grad_bias[:vocab], grad_CV)
        keep_u = u if x.teacher_hidden_NDt is not None and gemm.writes_into_buffer(x.teacher_hidden_NDt) else None
        return (z if gemm.writes_into_buffer(hidden_CD) else None), keep_u

    buffers: tuple[Tensor | None, Tensor | None] = (None, None)
    for n in range(0, num_rows, step):
        buffers = chunk(n, *buffers)
    return stats_SN, grad_hidden, grad_weight, grad_bias


def teacher_logits(
    x: Inputs, part: slice, vocab: int, buffer: Tensor | None, logit_scale: float, softcap: float | None
) -> Tensor:
    """Logits of TeacherHidden for the rows `part`."""
    assert x.teacher_hidden_NDt is not None
    assert x.teacher_weight_VDt is not None
    u_CV = gemm.logits(x.teacher_hidden_NDt[part], x.teacher_weight_VDt[:vocab], buffer)
    if x.teacher_bias_V is not None:
        u_CV += x.teacher_bias_V[:vocab]
    if logit_scale != 1.0:
        u_CV *= logit_scale
    if softcap is not None:
        u_CV.div_(softcap).tanh_().mul_(softcap)
    return u_CV
