"""Comparing trained models token by token: final losses, buckets of teacher confidence, curves at equal cost."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from effkern.models import Decoder
from effkern.ops.distill import linear_distill_loss
from effkern.train.device import autocast
from effkern.train.step import to_device


@torch.no_grad()
def token_losses(model: Decoder, batches: Iterable[np.ndarray], dtype: torch.dtype) -> dict[str, NDArray[np.float64]]:
    """Per predicted token of `batches`: ce, hit, entropy, each [rows, seq_len]."""
    device = next(model.parameters()).device
    found: dict[str, list[NDArray[np.float64]]] = {"ce": [], "hit": [], "entropy": []}
    for batch in batches:
        tokens = to_device(batch, device)
        with autocast(device, dtype):
            hidden = model(tokens[:, :-1]).flatten(0, 1)
            stats = linear_distill_loss(
                hidden, model.head_weight, tokens[:, 1:].flatten(), vocab_valid=model.vocab_valid
            ).stats
        for name, parts in found.items():
            parts.append(getattr(stats, name).double().cpu().numpy().reshape(len(batch), -1))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def summarise(losses: Mapping[str, NDArray[np.float64]], bytes_per_token: float) -> dict[str, float]:
    """Mean loss, accuracy, bits per byte, and number of tokens."""
    loss = float(losses["ce"].mean())
    return {
        "loss": loss,
        "accuracy": float(losses["hit"].mean()),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "tokens": int(losses["ce"].size),
    }


def paired_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> dict[str, float]:
    """Mean of second - first, and its standard error over rows.

    The error says how far the validation text could move the difference; it says nothing about another seed.
    """
    rows = (second - first).mean(axis=1)
    error = float(rows.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else 0.0
    return {"difference": float(rows.mean()), "validation_standard_error": error}


def confidence_buckets(
    losses: Mapping[str, Mapping[str, NDArray[np.float64]]], count: int = 5
) -> list[dict[str, float]]:
    """Mean loss of every model in buckets of equal size, from the tokens where the teacher is surest to the others.

    Confidence is the teacher's entropy.
    """
    order = np.argsort(losses["teacher"]["entropy"].ravel(), kind="stable")
    buckets = []
    for part in np.array_split(order, count):
        row = {"teacher_entropy": float(losses["teacher"]["entropy"].ravel()[part].mean())}
        row.update({name: float(values["ce"].ravel()[part].mean()) for name, values in losses.items()})
        buckets.append(row)
    return buckets


def value_at(evals: Sequence[Mapping[str, Any]], key: str, where: float) -> float | None:
    """Loss at `key` = where on a validation curve, interpolated; None outside the curve."""
    for before, after in itertools.pairwise(evals):
        if before[key] <= where <= after[key] and after[key] > before[key]:
            part = (where - before[key]) / (after[key] - before[key])
            return before["loss"] + part * (after["loss"] - before["loss"])
    return None


def gaps(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(tokens, loss of `second` - loss of `first`) wherever both curves have a measurement."""
    losses = {e["tokens"]: e["loss"] for e in first}
    return [(e["tokens"], e["loss"] - losses[e["tokens"]]) for e in second if e["tokens"] in losses]


def first_reaching(evals: Sequence[Mapping[str, Any]], key: str, loss: float) -> float | None:
    """The first `key` at which the curve is at or below `loss`, interpolated; None if it never is."""
    for before, after in itertools.pairwise(evals):
        if before["loss"] > loss >= after["loss"]:
            part = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before[key] + part * (after[key] - before[key])
    return None
