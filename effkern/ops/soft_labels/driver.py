"""The chunk driver: product, row pass, one chunk of rows at a time; N x V never exists."""

import torch
from torch import Tensor

from effkern import native
from effkern.ops.distill import gemm
from effkern.ops.distill.chunked import chunk_bytes as default_chunk_bytes
from effkern.ops.distill.chunked import chunk_rows
from effkern.ops.soft_labels.reference import reference_rows
from effkern.ops.soft_labels.rows import METHODS, RowOptions, num_slots


def cpp_rows(logits_RV: Tensor, positions_R: Tensor, options: RowOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The row pass of effkern._C; see `reference.reference_rows`."""
    native.load("_C")
    o = options
    return torch.ops.effkern.soft_label_rows(
        logits_RV, positions_R, METHODS.index(o.method), o.k, o.draws, o.temperature, o.seed
    )


def run(
    hidden_ND: Tensor,
    weight_VD: Tensor | None,
    bias_V: Tensor | None,
    positions_N: Tensor,
    options: RowOptions,
    softcap: float | None,
    logit_scale: float,
    vocab: int,
    impl: str,
    budget: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of all rows; without `weight_VD`, `hidden_ND` holds logits."""
    rows = cpp_rows if impl == "cpp" else reference_rows
    num_rows, dim = hidden_ND.shape
    acc = gemm.accumulator_dtype(hidden_ND.dtype)
    slots = num_slots(options, vocab)
    ids = hidden_ND.new_empty((num_rows, slots), dtype=torch.int32)
    logprobs = hidden_ND.new_empty((num_rows, slots), dtype=acc)
    tail, lse = hidden_ND.new_empty(num_rows, dtype=acc), hidden_ND.new_empty(num_rows, dtype=acc)
    if num_rows == 0:
        return ids, logprobs, tail, lse
    limit = default_chunk_bytes(hidden_ND.device) if budget is None else budget
    step = chunk_rows(num_rows, vocab, dim, acc.itemsize, limit)
    z: Tensor | None = None
    for n in range(0, num_rows, step):
        part = slice(n, min(n + step, num_rows))
        if weight_VD is None:
            z = hidden_ND[part, :vocab].to(acc)
        else:
            z = gemm.logits(hidden_ND[part], weight_VD[:vocab], z)
        # Logits that the caller gave are not written to.
        z = _cap(z, bias_V, softcap, logit_scale, vocab, z.data_ptr() == hidden_ND[part].data_ptr())
        ids[part], logprobs[part], tail[part], lse[part] = rows(z, positions_N[part], options)
    return ids, logprobs, tail, lse


def _cap(z: Tensor, bias: Tensor | None, softcap: float | None, scale: float, vocab: int, keep: bool) -> Tensor:
    """softcap(scale (z + bias)), in the memory of `z` unless it is to be kept."""
    if keep and (bias is not None or softcap is not None or scale != 1.0):
        z = z.clone()
    if bias is not None:
        z += bias[:vocab].to(z.dtype)
    if scale != 1.0:
        z *= scale
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z
