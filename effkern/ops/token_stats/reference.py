"""Plain PyTorch of both ops, the oracle of the compiled kernels; runs in float64 too.

N rows, V vocabulary, D hidden size
"""

import torch
from torch import Tensor


def label_rank(logits_NV: Tensor, labels: Tensor, ignore_index: int, vocab_valid: int) -> tuple[Tensor, ...]:
    """(loss, lse, label_logit, rank) of each row, as api.label_rank defines them."""
    z_NV = logits_NV[:, :vocab_valid]
    z_NV = z_NV if z_NV.dtype == torch.float64 else z_NV.float()
    ignored = labels == ignore_index
    outside = ~ignored & ((labels < 0) | (labels >= vocab_valid))

    y = labels.masked_fill(ignored | outside, 0)
    z_y = z_NV.gather(1, y[:, None]).squeeze(1).masked_fill(outside, float("nan"))
    lse = torch.logsumexp(z_NV, dim=1)
    rank = (z_NV > z_y[:, None]).sum(dim=1).masked_fill(ignored | outside, -1)

    loss = (lse - z_y).masked_fill(ignored, 0)
    return loss, lse.masked_fill(ignored, 0), z_y.masked_fill(ignored, 0), rank


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_valid: int | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, ...]:
    """(loss, lse, label_logit, rank) of each row, as head.token_stats defines them, with all of N x V in memory."""
    z_NV = hidden @ weight.t()
    z_NV = z_NV if z_NV.dtype == torch.float64 else z_NV.float()
    z_NV = logit_scale * (z_NV if bias is None else z_NV + bias.to(z_NV.dtype))
    if softcap is not None:
        z_NV = softcap * torch.tanh(z_NV / softcap)
    return label_rank(z_NV, labels.long(), ignore_index, weight.shape[0] if vocab_valid is None else vocab_valid)
