"""Operators of the loss: schemas, shape functions, and the kernel that runs the chunk driver.

`linear_distill_fwd` is the one op of the public function: losses and gradients in one go. `scale_grad_` is its
backward. `distill_rows_` is the row pass that effkern._C implements on CPU.
"""

import torch
from torch import Tensor

from effkern.ops.distill import chunked
from effkern.ops.distill.rows import RowOptions

_library = torch.library.Library("effkern", "FRAGMENT")

# Rows of a half-precision gradient that are widened at a time.
SCALE_ROWS = 2048

_library.define(
    "linear_distill_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor scale, Tensor omega, "
    "Tensor? teacher_logits, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "str divergence, float temperature, float teacher_temperature, float label_smoothing, float z_loss, "
    "float? softcap, float logit_scale, float? teacher_softcap, float teacher_logit_scale, int ignore_index, "
    "SymInt vocab_valid, ScalarType compute_dtype, str impl, bool[3] needs, int? chunk_bytes) "
    "-> (Tensor stats, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
_library.define("scale_grad_(Tensor(a!) grad, Tensor factor) -> ()")
_library.define(
    "distill_rows_(Tensor(a!) logits, Tensor? teacher, Tensor? bias, Tensor labels, Tensor scale, Tensor omega, "
    "Tensor(b!) stats, int divergence, bool want_grad, bool grad_bfloat16, float temperature, "
    "float teacher_temperature, float label_smoothing, float z_loss, float softcap, float logit_scale, "
    "int ignore_index) -> ()"
)


def grad_dtype(dtype: torch.dtype, compute_dtype: torch.dtype) -> torch.dtype:
    """Type in which a parameter's gradient leaves the op: its own, but float32 where float16 could underflow."""
    return torch.float32 if compute_dtype == torch.float16 else dtype


def _check_values(labels: Tensor, omega: Tensor, ignore_index: int, vocab_valid: int) -> None:
    """What only the values can tell; on a GPU by an asynchronous assertion, so that nothing waits."""
    in_range = ((labels >= 0) & (labels < vocab_valid)) | (labels == ignore_index)
    omega_ok = ((omega >= 0) & (omega <= 1)) | (labels == ignore_index)
    if labels.device.type != "cpu":
        torch._assert_async(in_range.all(), "linear_distill_loss: labels out of range")
        torch._assert_async(omega_ok.all(), "linear_distill_loss: omega outside [0, 1]")
        return
    if not bool(in_range.all()):
        bad = labels[~in_range][0].item()
        raise ValueError(
            f"linear_distill_loss: labels must lie in [0, {vocab_valid}) or be ignore_index ({ignore_index}), got {bad}"
        )
    if not bool(omega_ok.all()):
        raise ValueError(f"linear_distill_loss: omega must lie in [0, 1], got {omega[~omega_ok][0].item()}")


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    omega: Tensor,
    teacher_logits: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    divergence: str,
    temperature: float,
    teacher_temperature: float,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    ignore_index: int,
    vocab_valid: int,
    compute_dtype: torch.dtype,
    impl: str,
    needs: list[bool],
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_values(labels, omega, ignore_index, vocab_valid)
    inputs = chunked.Inputs(
        hidden.to(compute_dtype), weight.to(compute_dtype), bias, labels, scale, omega,
        teacher_logits, teacher_hidden, teacher_weight, teacher_bias,
    )  # fmt: skip
    options = RowOptions(
        divergence, temperature, teacher_temperature, label_smoothing, z_loss, softcap, logit_scale, ignore_index
    )
    # The products have their types already; autocast would round the float32 tiles.
    with torch.autocast(hidden.device.type, enabled=False):
        stats, grad_hidden, grad_weight, grad_bias = chunked.run(
            inputs, options, vocab_valid, impl, (needs[0], needs[1], needs[2]), chunk_bytes,
            (teacher_logit_scale, teacher_softcap),
        )  # fmt: skip
    none = hidden.new_empty(0)
    return (
        stats,
        none if grad_hidden is None else grad_hidden.to(hidden.dtype),
        none.clone() if grad_weight is None else grad_weight.to(grad_dtype(weight.dtype, compute_dtype)),
        none.clone() if grad_bias is None or bias is None else grad_bias.to(grad_dtype(bias.dtype, compute_dtype)),
    )


_library.impl("linear_distill_fwd", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("effkern::linear_distill_fwd", lib=_library)
def _fake(hidden, weight, bias, labels, *rest):
    compute_dtype, needs = rest[-4], rest[-2]
    acc = torch.promote_types(compute_dtype, torch.float32)

    def grad(like: Tensor, needed: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype, device=like.device) if needed else hidden.new_empty(0)

    return (
        hidden.new_empty((chunked.NUM_STATS, hidden.shape[0]), dtype=acc),
        grad(hidden, needs[0], hidden.dtype),
        grad(weight, needs[1], grad_dtype(weight.dtype, compute_dtype)),
        hidden.new_empty(0) if bias is None else grad(bias, needs[2], grad_dtype(bias.dtype, compute_dtype)),
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


_library.impl("scale_grad_", _scale_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("effkern::scale_grad_", lib=_library)
def _fake_scale(grad: Tensor, factor: Tensor) -> None:
    return None


@torch.library.register_fake("effkern::distill_rows_", lib=_library)
def _fake_rows(*args) -> None:
    return None
