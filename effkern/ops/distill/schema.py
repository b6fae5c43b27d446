"""Operators of the loss: schemas, shape functions, and the kernel that runs the chunk driver.

`linear_distill_fwd` is the one op of the public function: losses and gradients in one go. `scale_grad_` is its
backward. `distill_rows_` is the row pass that effkern._C implements on CPU.
"""

from typing import Any

import torch
from torch import Tensor

from effkern import native
from effkern.ops.distill import chunked, driver, gemm, values
from effkern.ops.distill.rows import RowOptions
from effkern.ops.distill.teachers import Source

_library = torch.library.Library("effkern", "FRAGMENT")

# Rows of a half-precision gradient that are widened at a time.
SCALE_ROWS = 2048

# The fields of RowOptions, in its order.
_ROW_OPTIONS = (
    "str divergence, float alpha, float beta, float divergence_scale, str teacher_kind, float temperature, "
    "float teacher_temperature, float label_smoothing, float z_loss, float? softcap, float logit_scale, "
    "int ignore_index"
)

_library.define(
    "linear_distill_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor scale, Tensor omega, "
    f"Tensor[] teacher, str source, float teacher_logit_scale, float? teacher_softcap, {_ROW_OPTIONS}, "
    "SymInt vocab_valid, ScalarType compute_dtype, str impl, bool check, bool[3] needs, SymInt? num_kept, "
    "int? chunk_bytes, int? memory_limit, bool may_stream, Tensor(a!)? weight_grad) "
    "-> (Tensor stats, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
_library.define("scale_grad_(Tensor(a!) grad, Tensor factor) -> ()")
_library.define(
    "distill_rows_(Tensor(a!) logits, Tensor? teacher, Tensor? ids, Tensor? logprobs, Tensor? bias, Tensor labels, "
    "Tensor scale, Tensor omega, Tensor(b!) stats, int divergence, float alpha, float beta, float divergence_scale, "
    "bool teacher_logprobs, int sparse_kind, bool want_grad, bool grad_bfloat16, float temperature, "
    "float teacher_temperature, float label_smoothing, float z_loss, float softcap, float logit_scale, "
    "int ignore_index) -> ()"
)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    omega: Tensor,
    teacher: list[Tensor] | None,
    source: str,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = RowOptions(*rest[: len(RowOptions._fields)])
    vocab, compute_dtype, impl, check, needs, num_kept, *memory, weight_grad = rest[len(RowOptions._fields) :]
    # A compiled package (AOTInductor) gives None for a list without tensors.
    given = Source(source, tuple(teacher or ()), teacher_logit_scale, teacher_softcap)
    values.check_rows(labels, omega, options.ignore_index, vocab, num_kept)
    if check:
        values.check_teacher(given, options, labels, vocab)
    inputs = chunked.Inputs(
        hidden.to(compute_dtype), weight.to(compute_dtype), bias, labels, scale, omega, given, weight_grad,
        gemm.grad_dtype(weight.dtype, compute_dtype),
    )  # fmt: skip
    # The products have their types already; autocast would round the float32 tiles.
    with torch.autocast(hidden.device.type, enabled=False):
        stats, grad_hidden, grad_weight, grad_bias = driver.run(
            inputs, options, vocab, impl, (needs[0], needs[1], needs[2]), driver.Memory(*memory), num_kept
        )
    none = hidden.new_empty(0)
    return (
        stats,
        none if grad_hidden is None else grad_hidden.to(hidden.dtype),
        none.clone() if grad_weight is None else grad_weight.to(gemm.grad_dtype(weight.dtype, compute_dtype)),
        none.clone() if grad_bias is None or bias is None else grad_bias.to(gemm.grad_dtype(bias.dtype, compute_dtype)),
    )


_library.impl("linear_distill_fwd", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("effkern::linear_distill_fwd", lib=_library)
def _fake(hidden, weight, bias, labels, *rest):
    compute_dtype, needs, weight_grad = rest[-9], rest[-6], rest[-1]
    acc = torch.promote_types(compute_dtype, torch.float32)

    def grad(like: Tensor, needed: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype, device=like.device) if needed else hidden.new_empty(0)

    return (
        hidden.new_empty((chunked.NUM_STATS, hidden.shape[0]), dtype=acc),
        grad(hidden, needs[0], hidden.dtype),
        grad(weight, needs[1] and weight_grad is None, gemm.grad_dtype(weight.dtype, compute_dtype)),
        hidden.new_empty(0) if bias is None else grad(bias, needs[2], gemm.grad_dtype(bias.dtype, compute_dtype)),
    )


def _scale_grad(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, the factor in its own type: rounded to bfloat16 it would bias every entry alike."""
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return
    if grad.dtype == factor.dtype:
        grad *= factor
        return
    for rows in grad.split(SCALE_ROWS):
        rows.copy_(rows.to(factor.dtype) * factor)


def _scale_grad_cuda(grad: Tensor, factor: Tensor) -> None:
    """The same without a wait: the kernel itself sees that the factor is 1."""
    if native.triton_missing() is not None or grad.dtype == torch.float64 or not grad.is_contiguous():
        _scale_grad(grad, factor)
        return
    from effkern.ops.distill.triton_scale import scale_grad

    scale_grad(grad, factor)


_library.impl("scale_grad_", _scale_grad, "CompositeExplicitAutograd")
_library.impl("scale_grad_", _scale_grad_cuda, "CUDA")


@torch.library.register_fake("effkern::scale_grad_", lib=_library)
def _fake_scale(grad: Tensor, factor: Tensor) -> None:
    return None


@torch.library.register_fake("effkern::distill_rows_", lib=_library)
def _fake_rows(*args) -> None:
    return None
