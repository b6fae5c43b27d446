"""The loss as an autograd function: its gradients come with the losses, and backward scales them."""

from typing import Any

import torch
from torch import Tensor

from effkern.ops.distill.arguments import OP


def apply_scale(grad: Tensor, factor: Tensor, dtype: torch.dtype, traced: bool) -> Tensor:
    """grad * factor in `dtype`. In place, unless the compiler, which reuses dead buffers itself, is tracing."""
    if traced:
        return (grad.to(factor.dtype) * factor).to(dtype)
    torch.ops.effkern.scale_grad_(grad, factor)
    return grad.to(dtype)


class LinearDistill(torch.autograd.Function):
    """Gradients are computed with the losses and kept until backward, which only scales them.

    The first backward takes the kept gradients and scales them in place. A second one (retain_graph=True), and
    reduction="none", whose row factors are unknown until then, run the op again.
    """

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, weight_N, omega_N, factor, scalars, needs, reduction, extras,
                *teacher):  # fmt: skip
        teacher = tuple(x for x in teacher if x is not None)
        late = reduction == "none"
        if extras[-1] is not None and needs[1]:
            refuse_checkpoint()
        compute_dtype = scalars[-3]
        # float16 gradients leave the row pass without 1 / denom, under which they could vanish.
        # What goes into weight_grad now cannot be scaled later.
        unscaled = compute_dtype == torch.float16 and extras[-1] is None
        inner = weight_N if unscaled else weight_N * factor
        rows = (labels, inner, omega_N)
        now = (False, False, False) if late else needs
        stats, *grads = _call_op(hidden, weight, bias, rows, teacher, scalars, now, extras)

        ctx.scalars, ctx.late, ctx.extras = scalars, late, extras
        # What went into weight_grad has no gradient of its own, and must not go there twice.
        ctx.needs = needs if extras[-1] is None else (needs[0], False, needs[2])
        ctx.into = extras[-1] is not None and needs[1]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.unscaled = unscaled
        ctx.traced = torch.compiler.is_compiling()
        ctx.kept = ctx.others = None
        if ctx.traced:
            ctx.save_for_backward(factor, *((hidden, weight, bias, *rows, *teacher) if late else grads))
        elif any(needs):
            # What gets no gradient stays outside of the saved tensors, which refuse those of inference_mode.
            ctx.save_for_backward(hidden, weight, bias)
            ctx.others, ctx.factor = (*rows, *teacher), factor
            ctx.versions = [version_of(x) for x in ctx.others]
            ctx.kept = None if late else grads
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        loss_N = torch.where(weight_N != 0, weight_N * stats[0], 0.0)
        if late:
            return loss_N, stats
        return torch.where(factor != 0, loss_N.sum() * factor, 0.0), stats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_loss = grad_outputs[0]
        nothing = (None,) * (len(ctx.needs_input_grad) - 3)
        if grad_loss is None:
            return None, None, None, *nothing
        if torch.is_grad_enabled() and not ctx.traced:
            raise NotImplementedError(f"{OP}: create_graph=True is not covered: the op has no second derivative")
        if ctx.into:
            check_unit(grad_loss)
        if ctx.traced:
            factor, *saved = ctx.saved_tensors
        else:
            factor, saved = ctx.factor, ctx.kept
            ctx.kept = None
        grads = _rerun(ctx, saved, grad_loss) if ctx.late or saved is None else saved
        if ctx.late:
            scaled = [g.to(d) if needed else None for g, d, needed in zip(grads, ctx.dtypes, ctx.needs)]
            return *scaled, *nothing
        scale = grad_loss * factor if ctx.unscaled else grad_loss
        scaled = [
            apply_scale(g, scale, dtype, ctx.traced) if needed else None
            for g, dtype, needed in zip(grads, ctx.dtypes, ctx.needs)
        ]
        return *scaled, *nothing


def _call_op(hidden, weight, bias, rows, teacher, scalars, needs, extras) -> Any:
    return torch.ops.effkern.linear_distill_fwd(
        hidden, weight, bias, *rows, list(teacher), *scalars, list(needs), *extras
    )


def refuse_checkpoint() -> None:
    """A checkpoint that keeps its tensors by hooks runs forward twice, and weight_grad would be added to twice."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if hooks is not None and not torch.compiler.is_compiling() and hooks(False) is not None:
        raise NotImplementedError(f"{OP}: weight_grad must be None inside of an activation checkpoint (use_reentrant="
                                  "False) and other hooks on saved tensors, got a tensor")  # fmt: skip


def check_unit(grad_loss: Tensor) -> None:
    """The gradient is in weight_grad already: it cannot be multiplied any more."""
    if grad_loss.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async((grad_loss == 1).all(), f"{OP}: with weight_grad the gradient of the loss must be 1")
    elif grad_loss.item() != 1:
        got = grad_loss.item()
        raise RuntimeError(f"{OP}: with weight_grad the gradient of the loss must be 1 (scale by denom), got {got}")


def version_of(x: Tensor | None) -> int | None:
    """Counts the writes to a tensor; tensors of inference_mode keep no count."""
    return None if x is None or x.is_inference() else x._version


def _rerun(ctx: Any, saved: Any, grad_loss: Tensor) -> list[Tensor]:
    """The gradients from the inputs, once more; with reduction="none" each row is scaled by its `grad_loss`."""
    if ctx.traced:
        hidden, weight, bias, labels, inner, omega_N, *teacher = saved
    else:
        hidden, weight, bias = ctx.saved_tensors
        labels, inner, omega_N, *teacher = ctx.others
        if [version_of(x) for x in ctx.others] != ctx.versions:
            raise RuntimeError(f"{OP}: labels or teacher were modified in place between forward and this backward")
    if ctx.late:
        inner = torch.where(inner != 0, inner * grad_loss, 0.0)
    rows, extras = (labels, inner, omega_N), (*ctx.extras[:-1], None)
    _, *grads = _call_op(hidden, weight, bias, rows, teacher, ctx.scalars, ctx.needs, extras)
    return grads
