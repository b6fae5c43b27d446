"""The loss over slices as an autograd function: gradients come with the losses, and backward scales them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill import chunked, gemm
from effkern.ops.distill.autograd import apply_scale, check_unit, refuse_checkpoint, version_of
from effkern.ops.distill.parallel import chunks
from effkern.ops.distill.parallel.agree import OP
from effkern.ops.distill.parallel.chunks import Layout, Reductions
from effkern.ops.distill.rows import RowOptions
from effkern.ops.distill.teachers import Source


class Call(NamedTuple):
    """Everything but the tensors that get a gradient."""

    labels_N: Tensor
    weight_N: Tensor
    omega_N: Tensor
    factor: Tensor
    teacher: Source
    options: RowOptions
    layout: Layout
    budget: int
    reductions: Reductions
    needs: tuple[bool, ...]
    late: bool
    """reduction="none": the rows' factors are known in backward only."""
    num_kept: int | None
    weight_grad: Tensor | None
    compute_dtype: torch.dtype
    compiled: bool


def _execute(
    call: Call, student: tuple[Tensor, Tensor, Tensor | None], scale_N: Tensor, needs: tuple[bool, ...], into: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Statistics, and gradients of sum_n scale_n loss_n in the types in which they leave the op."""
    hidden, weight, bias = student
    dtype = call.compute_dtype
    inputs = chunked.Inputs(
        hidden.detach().to(dtype), weight.detach().to(dtype), None if bias is None else bias.detach(), call.labels_N,
        scale_N, call.omega_N, call.teacher, call.weight_grad if into else None,
    )  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False):
        stats, *grads = chunks.run(
            inputs, call.options, call.layout, call.reductions, (needs[0], needs[1], needs[2]),
            budget=call.budget, num_kept=call.num_kept, compiled=call.compiled,
        )  # fmt: skip
    types = (
        hidden.dtype,
        gemm.grad_dtype(weight.dtype, dtype),
        None if bias is None else gemm.grad_dtype(bias.dtype, dtype),
    )
    return stats, [None if grad is None else grad.to(to) for grad, to in zip(grads, types)]


class ParallelDistill(torch.autograd.Function):
    """The first backward takes the kept gradients; a second one, and reduction="none", run the loss again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        # float16 gradients leave the row pass without 1 / denom, under which they could vanish.
        # What goes into weight_grad now cannot be scaled later.
        ctx.unscaled = call.compute_dtype == torch.float16 and call.weight_grad is None
        if call.weight_grad is not None and call.needs[1]:
            refuse_checkpoint()
        ctx.inner = call.weight_N if ctx.unscaled else call.weight_N * call.factor
        now = (False, False, False) if call.late else call.needs
        stats, grads = _execute(call, (hidden, weight, bias), ctx.inner, now, True)
        ctx.into = call.weight_grad is not None and call.needs[1]
        ctx.call, ctx.kept = call, None
        if any(call.needs):
            ctx.save_for_backward(hidden, weight, bias)
            ctx.kept = None if call.late else grads
            ctx.others = (call.labels_N, *call.teacher.tensors)
            ctx.versions = [version_of(x) for x in ctx.others]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        loss_N = torch.where(call.weight_N != 0, call.weight_N * stats[0], 0.0)
        if call.late:
            return loss_N, stats
        return torch.where(call.factor != 0, loss_N.sum() * call.factor, 0.0), stats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_loss, call = grad_outputs[0], ctx.call
        if grad_loss is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            raise NotImplementedError(f"{OP}: create_graph=True is not covered: the op has no second derivative")
        if ctx.into:
            check_unit(grad_loss)
        grads, ctx.kept = ctx.kept, None
        if grads is None:
            grads = _again(ctx, grad_loss)
        types = [None if x is None else x.dtype for x in ctx.saved_tensors]
        scale = grad_loss * call.factor if ctx.unscaled else grad_loss
        results: list[Tensor | None] = []
        for grad, dtype in zip(grads, types):
            if grad is None or dtype is None:
                results.append(None)
            else:
                results.append(grad.to(dtype) if call.late else apply_scale(grad, scale, dtype, False))
        return *results, None


def _again(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    """The gradients from the inputs; with reduction="none" each row is scaled by its `grad_loss`."""
    call = ctx.call
    if [version_of(x) for x in ctx.others] != ctx.versions:
        raise RuntimeError(f"{OP}: labels or teacher were modified in place between forward and this backward")
    inner = torch.where(ctx.inner != 0, ctx.inner * grad_loss, 0.0) if call.late else ctx.inner
    # What went into weight_grad must not go there twice.
    needs = (call.needs[0], call.needs[1] and not ctx.into, call.needs[2])
    return _execute(call, ctx.saved_tensors, inner, needs, False)[1]
