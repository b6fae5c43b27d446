"""The loss of a decoder with an exit gate: the expected cross entropy over loops, less an entropy of the exits.

L loops, N tokens of a micro-batch, d hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.models import Decoder
from effkern.models.decoder import LoopOutputs
from effkern.nn.looped.gate import expected_exit_loss
from effkern.ops.distill import linear_distill_loss


class ExitLoss(NamedTuple):
    """Sums of a micro-batch over the step's denominator, and statistics of its last loop."""

    loss: Tensor
    ce: Tensor
    """Of the last loop, [N]."""
    hit: Tensor
    """Whether its most likely token is the label, [N]."""


def exit_loss(
    model: Decoder,
    inputs: Tensor,
    targets: Tensor,
    *,
    step: int,
    ignore: int,
    denom: Any,
    outputs: Callable[..., LoopOutputs] | None = None,
) -> ExitLoss:
    """sum over tokens of (sum_t p_t CE_t - exit_beta H(p)) / denom, with p of the gate (Ouro's first stage).

    The gradient of CE_t goes through all loops' logits in chunks, weighted by p_t as a constant; that of p_t takes CE_t
    as a constant: together they are that of the product.

    Args:
        inputs: int64 [rows, length]. targets: int64 [N = rows * length], or `ignore`.
        step: of training, for drawn loops. denom: tokens that count in the whole step.
        outputs: the model's loop_outputs as ranks share it.

    Memory: the states and last hidden states of all loops, 2 L N d; never V x N.
    """
    found = (outputs or model.loop_outputs)(inputs, step=step)
    hidden, log_probs = found.hidden.flatten(1, 2), found.log_probs.flatten(1)
    probs = log_probs.detach().exp()
    result = linear_distill_loss(
        hidden.flatten(0, 1), model.head_weight, targets.repeat(len(hidden)), weights=probs.flatten(),
        ignore_index=ignore, vocab_valid=model.vocab_valid, denom=denom,
    )  # fmt: skip
    counts = targets != ignore
    # As in the loss: averaged over ranks it may be below 1, and where nothing counts it is 0.
    divisor = torch.where(denom > 0, denom, 1.0) if isinstance(denom, Tensor) else denom or 1
    ce = result.stats.ce.detach().view_as(log_probs).to(log_probs.dtype)
    share = counts.sum().to(ce.dtype) / divisor
    gate = expected_exit_loss(log_probs, ce, model.config.loop.exit_beta, mask=counts) * share
    # The first term holds p_t CE_t already.
    loss = result.loss + gate - torch.where(counts, probs * ce, 0.0).sum() / divisor
    return ExitLoss(loss, ce[-1], result.stats.hit.view_as(log_probs)[-1])
