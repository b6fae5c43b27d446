"""label_rank: loss and rank of each token's label in one pass over the logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.token_stats import reference
from effkern.ops.token_stats import schema as schema

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LabelStats(NamedTuple):
    """One entry per row; see label_rank."""

    loss: Tensor
    lse: Tensor
    label_logit: Tensor
    rank: Tensor


def label_rank(
    logits_NV: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    vocab_valid: int | None = None,
    impl: str = "auto",
) -> LabelStats:
    """Loss of each row's label, and how many logits exceed the label's.

    lse = log sum_i exp(z_i),  loss = lse - z_y,  rank = #{i : z_i > z_y}  (0: the label is a top-1 token; ties share)
    Sums run in float32 whatever the logits are. One pass over the logits, no sort.

    Rows whose label is `ignore_index`: loss, lse and label_logit 0, rank -1.
    Comparisons and sums follow IEEE 754: a NaN among the logits makes lse and loss NaN, and counts as exceeding
    nothing; a label logit that is NaN is exceeded by nothing (rank 0). z_y = -inf gives loss +inf, or NaN where the
    whole row is -inf.

    Args:
        logits_NV: shape [N, V], float32/bfloat16/float16, stride 1 along V, any stride between rows. Gets no gradient.
        labels: int64, shape [N], same device, contiguous, each `ignore_index` or in [0, vocab_valid).
        ignore_index: label of the rows that are left out.
        vocab_valid: the columns from here on are padding and are not read; default V.
        impl: "auto", "cuda", "cpp" or "reference".

    Returns:
        LabelStats(loss, lse, label_logit, rank), each [N]; float32 (loss in nats) and int64.

    Raises:
        ValueError: a shape, layout, device or size is wrong; a label is out of range (looked at on the CPU outside
            torch.compile only; elsewhere such a row gets loss and label_logit NaN and rank -1, without a host sync).
        TypeError: unsupported dtype.
        NotImplementedError: the chosen impl cannot run on this device.

    Memory: O(N) besides the inputs (reference: O(N V)). Deterministic.
    Source: the SALT_DS score needs (loss, rank): Rawat et al., arXiv 2410.18779.
    """
    vocab = _check(logits_NV, labels, vocab_valid)
    logits_NV = logits_NV.detach()
    if not torch.compiler.is_compiling() and labels.device.type == "cpu":
        _check_range(labels, ignore_index, vocab)
    if registry.choose("label_rank", impl, logits_NV.device) == "reference":
        return LabelStats(*reference.label_rank(logits_NV, labels, ignore_index, vocab))
    return LabelStats(*torch.ops.effkern.label_rank(logits_NV, labels, ignore_index, vocab))


def _check(logits: Tensor, labels: Tensor, vocab_valid: int | None) -> int:
    if logits.dim() != 2:
        raise ValueError(f"label_rank: logits must be [N, V], got {logits.dim()} dimensions")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"label_rank: logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"label_rank: labels must be int64, got {labels.dtype}")
    num_rows, vocab = logits.shape
    if labels.shape != (num_rows,):
        raise ValueError(f"label_rank: labels must have shape ({num_rows},), got {tuple(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"label_rank: labels must be on {logits.device}, got {labels.device}")
    if not 1 <= vocab < 2**31:
        raise ValueError(f"label_rank: logits must have 1 to 2^31 - 1 columns, got {vocab}")
    if logits.stride(1) != 1 and vocab > 1:
        raise ValueError(f"label_rank: logits must have stride 1 along V, got {logits.stride(1)}")
    if not labels.is_contiguous():
        raise ValueError(f"label_rank: labels must be contiguous, got stride {labels.stride(0)}")
    if vocab_valid is None:
        return vocab
    if not 1 <= vocab_valid <= vocab:
        raise ValueError(f"label_rank: vocab_valid must be in [1, {vocab}], got {vocab_valid}")
    return vocab_valid


def _check_range(labels: Tensor, ignore_index: int, vocab: int) -> None:
    outside = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if outside.any():
        bad = labels[outside][0].item()
        raise ValueError(f"label_rank: labels must be {ignore_index} or in [0, {vocab}), got {bad}")
