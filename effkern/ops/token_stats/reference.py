"""Plain PyTorch of label_rank, the oracle of the compiled kernels. N rows, V vocabulary; runs in float64 too."""

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
