"""How likely a model finds given continuations: what multiple-choice and perplexity tasks ask for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from effkern.models import Decoder
from effkern.ops.distill import linear_distill_loss
from effkern.train.device import autocast

IGNORE = -100


@dataclass(frozen=True)
class Score:
    """Of one continuation."""

    log_likelihood: float
    """sum_t log p(token_t | context, earlier tokens), nats; summed in float64."""
    greedy: bool
    """Every token is the most likely one."""


@torch.no_grad()
def score_continuations(
    model: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[Score]:
    """Scores of (context, continuation) pairs of token ids, in order; logits are never stored.

    Pairs of like length share a batch, padded at the right, where a causal model does not look. Of a context that is
    too long the last tokens count.

    Args:
        model: in evaluation mode. dtype: of its products (effkern.train.device.autocast).

    Raises:
        ValueError: an empty context or continuation, or a continuation longer than the model's max_seq_len.
    """
    limit = model.config.max_seq_len
    for context, continuation in pairs:
        if not context or not 1 <= len(continuation) <= limit:
            rule = f"a context, and a continuation of 1 to max_seq_len={limit} tokens"
            raise ValueError(f"score_continuations: pairs must hold {rule}, got {len(context)} and {len(continuation)}")
    device = next(model.parameters()).device
    rows = [[*context, *continuation][-(limit + 1) :] for context, continuation in pairs]
    scores: list[Score | None] = [None] * len(pairs)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        longest = len(rows[chosen[0]]) - 1
        inputs = torch.zeros(len(chosen), longest, dtype=torch.int64)
        labels = torch.full_like(inputs, IGNORE)
        for place, i in enumerate(chosen):
            row, count = torch.tensor(rows[i]), len(pairs[i][1])
            inputs[place, : len(row) - 1] = row[:-1]
            labels[place, len(row) - 1 - count : len(row) - 1] = row[-count:]
        with autocast(device, dtype):
            hidden = model(inputs.to(device)).flatten(0, 1)
            stats = linear_distill_loss(
                hidden,
                model.head_weight,
                labels.to(device).flatten(),
                ignore_index=IGNORE,
                vocab_valid=model.vocab_valid,
            ).stats
        ce = stats.ce.double().view(len(chosen), -1).sum(1).tolist()
        hits = stats.hit.double().view(len(chosen), -1).sum(1).tolist()
        for i, loss, hit in zip(chosen, ce, hits):
            scores[i] = Score(-loss, hit == len(pairs[i][1]))
    return [score for score in scores if score is not None]
