"""Validation: loss, next-token accuracy and bits per byte, through the same loss op as training."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from effkern.models import Decoder
from effkern.ops.distill import linear_distill_loss
from effkern.train.device import autocast
from effkern.train.parallel import ALONE, IGNORE, Alone
from effkern.train.step import to_device


@dataclass(frozen=True)
class EvalResult:
    """Means over `tokens` predicted tokens."""

    loss: float
    """Cross entropy, nats per token."""
    accuracy: float
    """Share of positions whose label is the most likely token."""
    bits_per_byte: float
    """loss / ln 2 / bytes per token of the split."""
    tokens: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Decoder,
    batches: Iterable[np.ndarray],
    bytes_per_token: float,
    dtype: torch.dtype = torch.float32,
    parallel: Alone = ALONE,
) -> EvalResult:
    """Mean over `batches` of int64 [rows, seq_len + 1], which the ranks share.

    Raises:
        ValueError: `batches` is empty.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    count = 0
    was_training = model.training
    model.eval()
    try:
        for batch, rows in parallel.share(batches):
            tokens = to_device(batch, device)
            targets = tokens[:, 1:].clone()
            targets[rows:] = IGNORE
            with autocast(device, dtype):
                hidden = model(tokens[:, :-1]).flatten(0, 1)
                loss_op = parallel.spread_loss or linear_distill_loss
                stats = loss_op(
                    hidden, model.head_weight, targets.flatten(), ignore_index=IGNORE, vocab_valid=model.vocab_valid
                ).stats
            sums += torch.stack((stats.ce.double().sum(), stats.hit.double().sum()))
            count += targets[:rows].numel()
    finally:
        model.train(was_training)
    count = int(parallel.add(torch.tensor(count, device=device)))
    if count == 0:
        raise ValueError(
            "evaluate: batches must hold at least one sequence, got none (is the split shorter than seq_len?)"
        )
    loss, accuracy = (parallel.total(sums) / count).tolist()
    return EvalResult(loss, accuracy, loss / math.log(2) / bytes_per_token, count)
