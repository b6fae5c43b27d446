"""The C++ row pass: one call of effkern._C per chunk, the gradient in the memory of the logits."""

import torch
from torch import Tensor

from effkern import native
from effkern.ops.distill.rows import DIVERGENCES, RowOptions


def cpp_rows(
    logits_RV: Tensor,
    teacher_RV: Tensor | None,
    bias_V: Tensor | None,
    labels_R: Tensor,
    scale_R: Tensor,
    omega_R: Tensor,
    stats_SR: Tensor,
    grad_dtype: torch.dtype | None,
    options: RowOptions,
) -> Tensor | None:
    """See `rows.reference_rows`. A bfloat16 gradient fills the first half of each row of `logits_RV`."""
    native.missing("_C")
    o = options
    torch.ops.effkern.distill_rows_(
        logits_RV, teacher_RV, bias_V, labels_R, scale_R, omega_R, stats_SR,
        DIVERGENCES.index(o.divergence), grad_dtype is not None, grad_dtype == torch.bfloat16,
        o.temperature, o.teacher_temperature, o.label_smoothing, o.z_loss, o.softcap or 0.0, o.logit_scale,
        o.ignore_index,
    )  # fmt: skip
    if grad_dtype is None:
        return None
    if grad_dtype == torch.bfloat16:
        return logits_RV.view(torch.bfloat16)[:, : logits_RV.shape[1]]
    return logits_RV
