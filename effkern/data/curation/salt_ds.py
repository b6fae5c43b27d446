"""What a small model says of each example: its mean loss, and the SALT_DS score."""

import numpy as np
import torch
from numpy.typing import NDArray

from effkern.data.curation.pool import Pool
from effkern.models import Decoder
from effkern.ops.token_stats import token_stats

MASKED = ("zero", "drop")


def salt_ds_score(
    loss: NDArray[np.floating], rank: NDArray[np.int64], *, k: int = 10, masked: str = "zero"
) -> NDArray[np.float64]:
    """Challenging yet learnable: the median loss of a sequence, tokens that are not among the k likeliest masked.

    S(x) = median over t of 1{rank_t < k} loss_t;  with masked="drop" the median over the tokens of rank < k alone.

    With "zero" a sequence with fewer than half of its tokens among the k likeliest scores 0. A sequence with none of
    them scores 0 either way. Of an even number the median is the mean of the two in the middle.

    Args:
        loss: nats, [N, T]. rank: [N, T], 0 is the likeliest token; -1: the token does not count at all.
        k: at least 1. The paper's is 10.
        masked: "zero" or "drop"; which of them the paper means is open.

    Returns:
        float64 [N]; the largest are to be kept.

    Raises:
        ValueError: shapes differ, or an option is out of range.
    Source: Rawat et al., arXiv 2410.18779, equation (10) as reviewers describe it.
    """
    if loss.shape != rank.shape or loss.ndim != 2:
        raise ValueError(f"salt_ds_score: loss and rank must be [N, T], got {loss.shape} and {rank.shape}")
    if k < 1:
        raise ValueError(f"salt_ds_score: k must be at least 1, got {k}")
    if masked not in MASKED:
        raise ValueError(f"salt_ds_score: masked must be one of {', '.join(MASKED)}, got {masked!r}")
    counted, learnable = rank >= 0, (rank >= 0) & (rank < k)
    used = np.where(counted if masked == "zero" else learnable, np.where(learnable, loss, 0.0), np.inf)
    used = np.sort(used.astype(np.float64), axis=1)
    count = np.isfinite(used).sum(1)
    rows, last = np.arange(len(used)), np.maximum(count - 1, 0)
    middle = (used[rows, last // 2] + used[rows, np.minimum((last + 1) // 2, last)]) / 2
    return np.where(count > 0, np.nan_to_num(middle, posinf=0.0), 0.0)


class Scorer:
    """Mean loss and SALT_DS score of examples under a model.

    Args:
        model: the small model, in eval mode, on its device; the paper takes an early checkpoint for the score.
        pool: the examples.
        k, masked: of `salt_ds_score`.
    """

    def __init__(self, model: Decoder, pool: Pool, *, k: int = 10, masked: str = "zero") -> None:
        if pool.seq_len > model.config.max_seq_len:
            raise ValueError(f"score: seq_len must be at most {model.config.max_seq_len}, got {pool.seq_len}")
        # Wrong options are said before the pass.
        salt_ds_score(np.zeros((1, 1)), np.zeros((1, 1), np.int64), k=k, masked=masked)
        self.model, self.pool, self.k, self.masked = model, pool, k, masked
        self.device = model.embedding.weight.device

    @torch.no_grad()
    def __call__(self, examples: NDArray[np.int64]) -> NDArray[np.float64]:
        """[B, 3]: mean loss in nats a token, score, share of the tokens among the k likeliest."""
        tokens = torch.from_numpy(self.pool.tokens(examples, 1)).to(self.device)
        hidden = self.model(tokens[:, :-1]).flatten(0, 1)
        weight = self.model.head_weight.to(hidden.dtype)
        found = token_stats(hidden, weight, tokens[:, 1:].flatten(), vocab_valid=self.model.vocab_valid)
        loss, rank = (x.view(len(tokens), -1).cpu().numpy() for x in (found.loss, found.rank))
        score = salt_ds_score(loss, rank, k=self.k, masked=self.masked)
        return np.stack([loss.mean(1, dtype=np.float64), score, (rank < self.k).mean(1)], 1)
