"""The Triton row pass: which kernel serves a chunk, and how it is launched.

All arithmetic is float32. A narrower gradient goes to a buffer of its own, in the type of the matrix products.
"""

import torch
from torch import Tensor

from effkern.ops.distill.rows import TAIL_FLOOR, RowOptions, Rows
from effkern.ops.distill.triton_cases import COMPILE_CASES
from effkern.ops.distill.triton_dense import distill_dense_kernel
from effkern.ops.distill.triton_launch import (
    DENSE_LAUNCH,
    SPARSE_LAUNCH,
    Launch,
    kept_blocks,
    launch_of,
    needs_middle_pass,
)
from effkern.ops.distill.triton_sparse import distill_sparse_kernel

__all__ = ["COMPILE_CASES", "triton_rows"]


def triton_rows(rows: Rows, grad_dtype: torch.dtype | None, options: RowOptions) -> Tensor | None:
    """See `reference.reference_rows`. A float32 gradient replaces `logits_RV`; a narrower one gets a buffer."""
    logits_RV = rows.logits_RV
    grad_RV = logits_RV if grad_dtype in (None, logits_RV.dtype) else torch.empty_like(logits_RV, dtype=grad_dtype)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(logits_RV):
        launch = _launch_sparse if rows.teacher_RV is None else _launch_dense
        launch(rows, grad_RV, grad_dtype is not None, options)
    return None if grad_dtype is None else grad_RV


def _shared_flags(rows: Rows, want_grad: bool, options: RowOptions, launch: Launch) -> dict[str, bool | int]:
    return {
        "TEMPERED": options.temperature != 1.0, "HAS_BIAS": rows.bias_V is not None,
        "HAS_CAP": options.softcap is not None, "WANT_GRAD": want_grad,
        "RESIDENT": rows.logits_RV.shape[1] <= launch.block, "BLOCK": launch.block,
        "num_warps": launch.warps, "maxnreg": launch.registers, "enable_fp_fusion": True,
    }  # fmt: skip


def _launch_dense(rows: Rows, grad_RV: Tensor, want_grad: bool, options: RowOptions) -> None:
    o, logits_RV, teacher_RV = options, rows.logits_RV, rows.teacher_RV
    assert teacher_RV is not None
    num_rows, vocab = logits_RV.shape
    logprobs = o.teacher == "logprobs"
    distill_dense_kernel[(num_rows,)](
        logits_RV, teacher_RV, logits_RV if rows.bias_V is None else rows.bias_V, rows.labels_R, rows.scale_R,
        rows.omega_R, rows.stats_SR, grad_RV, vocab, logits_RV.stride(0), teacher_RV.stride(0),
        rows.stats_SR.stride(0), grad_RV.stride(0), o.ignore_index, o.alpha, o.beta, 1.0 - o.alpha, 1.0 - o.beta,
        o.divergence_scale, 1.0 / o.temperature, 1.0 if logprobs else 1.0 / o.teacher_temperature,
        o.label_smoothing, o.z_loss, o.softcap or 1.0, o.logit_scale,
        DIVERGENCE=o.divergence, MIDDLE=needs_middle_pass(o.divergence), LOGPROBS=logprobs,
        **_shared_flags(rows, want_grad, o, launch_of(DENSE_LAUNCH, vocab)),
    )  # fmt: skip


def _launch_sparse(rows: Rows, grad_RV: Tensor, want_grad: bool, options: RowOptions) -> None:
    """A sparse teacher or none."""
    o, logits_RV = options, rows.logits_RV
    given = rows.ids_RK is not None
    ids_RK = rows.ids_RK if rows.ids_RK is not None else rows.labels_R[:, None]
    logprobs_RK = rows.logprobs_RK if rows.logprobs_RK is not None else logits_RV
    num_rows, vocab = logits_RV.shape
    distill_sparse_kernel[(num_rows,)](
        logits_RV, ids_RK, logprobs_RK, logits_RV if rows.bias_V is None else rows.bias_V, rows.labels_R,
        rows.scale_R, rows.omega_R, rows.stats_SR, grad_RV, vocab, ids_RK.shape[1], logits_RV.stride(0),
        rows.stats_SR.stride(0), grad_RV.stride(0), o.ignore_index, o.divergence_scale, 1.0 / o.temperature,
        1.0 / o.teacher_temperature, TAIL_FLOOR, o.label_smoothing, o.z_loss, o.softcap or 1.0, o.logit_scale,
        KIND=o.teacher if given else "none", REVERSE=given and o.divergence == "reverse_kl",
        **kept_blocks(ids_RK.shape[1]), **_shared_flags(rows, want_grad, o, launch_of(SPARSE_LAUNCH, vocab)),
    )  # fmt: skip
