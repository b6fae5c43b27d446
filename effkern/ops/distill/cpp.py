"""The C++ row pass: one call of effkern._C per chunk, the gradient in the memory of the logits."""

import torch
from torch import Tensor

from effkern import native
from effkern.ops.distill.rows import DIVERGENCES, SPARSE_KINDS, RowOptions, Rows

_NAMES = list(DIVERGENCES)

# oneDNN's AMX products read rows of bfloat16 in steps of so many entries, and multiply what lies behind them by 0: NaN
# stays NaN. Behind a gradient there are halves of float32 logits, any bits.
_STEP = 32


def cpp_rows(rows: Rows, grad_dtype: torch.dtype | None, options: RowOptions) -> Tensor | None:
    """See `reference.reference_rows`. A bfloat16 gradient fills the first half of each row of `logits_RV`."""
    native.load("_C")
    o, logits_RV = options, rows.logits_RV
    sparse_kind = SPARSE_KINDS.index(o.teacher) if rows.ids_RK is not None else -1
    torch.ops.effkern.distill_rows_(
        *rows, _NAMES.index(o.divergence), o.alpha, o.beta, o.divergence_scale, o.teacher == "logprobs", sparse_kind,
        grad_dtype is not None, grad_dtype == torch.bfloat16, o.temperature, o.teacher_temperature, o.label_smoothing,
        o.z_loss, o.softcap or 0.0, o.logit_scale, o.ignore_index,
    )  # fmt: skip
    if grad_dtype is None:
        return None
    if grad_dtype == torch.bfloat16:
        halves, vocab = logits_RV.view(torch.bfloat16), logits_RV.shape[1]
        halves[:, vocab : vocab + -vocab % _STEP] = 0
        return halves[:, :vocab]
    return logits_RV
