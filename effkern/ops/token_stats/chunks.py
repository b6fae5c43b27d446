"""The chunk driver of token_stats: product, finish, one read of the logits; N x V never exists.

N rows, C rows of a chunk, V vocabulary, D hidden size
"""

import torch
from torch import Tensor

from effkern.ops.distill import gemm
from effkern.ops.distill.chunked import chunk_bytes, chunk_rows
from effkern.ops.token_stats import reference


def run(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    impl: str,
    budget: int | None,
) -> tuple[Tensor, Tensor]:
    """Statistics [3, N] (loss, lse, label_logit) and rank [N]; all entries of `weight` count.

    Args:
        hidden_ND: in the type of the product, as `weight`.
        budget: bytes of the logits' buffer, or None for the device's default.
    """
    acc = gemm.accumulator_dtype(hidden_ND.dtype)
    device = hidden_ND.device
    num_rows, dim = hidden_ND.shape
    vocab = weight_VD.shape[0]
    bias_V = None if bias_V is None else bias_V.to(acc)
    labels_N = labels_N.long().contiguous()
    stats_SN = torch.zeros(3, num_rows, dtype=acc, device=device)
    rank_N = torch.full((num_rows,), -1, dtype=torch.int64, device=device)

    # Which rows count is known without a wait on a CPU only.
    kept = (labels_N != ignore_index).nonzero().squeeze(1) if device.type == "cpu" else None
    if kept is not None and kept.numel() == num_rows:
        kept = None
    num_kept = num_rows if kept is None else kept.numel()
    limit = chunk_bytes(device) if budget is None else budget
    step = chunk_rows(num_kept, vocab, dim, acc.itemsize, limit)

    z_CV: Tensor | None = None
    for n in range(0, num_kept, step):
        rows: Tensor | slice = slice(n, min(n + step, num_kept)) if kept is None else kept[n : n + step]
        hidden_CD = hidden_ND[rows]
        z_CV = gemm.logits(hidden_CD, weight_VD, z_CV)
        if bias_V is not None:
            z_CV += bias_V
        if logit_scale != 1.0:
            z_CV *= logit_scale
        if softcap is not None:
            z_CV.div_(softcap).tanh_().mul_(softcap)
        *parts, rank = _read(z_CV, labels_N[rows], ignore_index, impl)
        stats_SN[:, rows] = torch.stack(parts)
        rank_N[rows] = rank
        if not gemm.writes_into_buffer(hidden_CD):
            z_CV = None
    return stats_SN, rank_N


def _read(z_CV: Tensor, labels_C: Tensor, ignore_index: int, impl: str) -> tuple[Tensor, ...]:
    """(loss, lse, label_logit, rank) of finished logits."""
    if impl == "reference":
        return reference.label_rank(z_CV, labels_C, ignore_index, z_CV.shape[1])
    return torch.ops.effkern.label_rank(z_CV, labels_C, ignore_index, z_CV.shape[1])
