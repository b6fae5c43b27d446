"""The residual as an autograd function around laurel_fwd and laurel_bwd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """The last fields of driver.Problem, the implementation, and whether backward keeps the branch."""

    scalar_map: str
    scale: float
    low_rank_eps: float
    norm_eps: float
    impl: str
    save_branch: bool


def apply(options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """LaurelResidual.apply; without gradients the operator alone, which saves 10 microseconds a call."""
    return LaurelResidual.apply(options, *tensors) if torch.is_grad_enabled() else _forward(options, *tensors)[:3]


def _forward(options: Options, branch, x, weights, down, up, past, low_rank_weight, coefficients, norm_weight,
             *addends):  # fmt: skip
    return torch.ops.effkern.laurel_fwd(
        branch, x, weights, down, up, past, low_rank_weight, list(addends), coefficients, norm_weight, *options[:-1]
    )


class LaurelResidual(torch.autograd.Function):
    """Returns y, normed (empty without a norm) and x A (empty without A)."""

    @staticmethod
    def forward(ctx: Any, options: Options, branch, x, weights, down, up, past, low_rank_weight, coefficients,
                norm_weight, *addends):  # fmt: skip
        y, normed, own, rstd = _forward(
            options, branch, x, weights, down, up, past, low_rank_weight, coefficients, norm_weight, *addends
        )
        ctx.options = options
        # y is the next block's input, so that keeping it costs no memory; where it is not read, it is not kept.
        reads_y = norm_weight is not None or (weights is not None and not options.save_branch)
        # Addends are read for their factors' gradients, and for alpha's; otherwise x stands for them, as to shape.
        reads_addends = weights is not None or (coefficients is not None and ctx.needs_input_grad[8])
        kept = addends if reads_addends else (x,) * len(addends)
        ctx.save_for_backward(
            branch if options.save_branch else None, x, weights, down, up, past, low_rank_weight, coefficients,
            norm_weight, *kept, y if reads_y else None, None if down is None else own,
            None if norm_weight is None else rstd,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return y, normed, own

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError("laurel_residual: create_graph=True is not covered: no second derivative")
        # Read once: a checkpoint unpacks only once.
        *inputs, y, own, rstd = ctx.saved_tensors
        branch, x, weights, down, up, past, low_rank_weight, coefficients, norm_weight, *addends = inputs
        grad_y, grad_normed, grad_own = (None if g is None else g.contiguous() for g in grad_outputs)
        if grad_y is None and grad_normed is None and grad_own is None:
            return (None,) * (len(inputs) + 1)
        *grads, of_addends = torch.ops.effkern.laurel_bwd(
            branch, x, weights, down, up, past, low_rank_weight, addends, coefficients, norm_weight, *ctx.options[:-1],
            y, own, rstd, grad_y, grad_normed if norm_weight is not None else None, None if down is None else grad_own,
        )  # fmt: skip
        takers = (None, None, weights, down, up, past, low_rank_weight, coefficients, norm_weight)
        result = [g if t is None else _as(g, t) for g, t in zip(grads, takers)]
        needed = ctx.needs_input_grad[1:]
        return (None, *(g if n else None for g, n in zip((*result, *of_addends), needed)))


def _as(grad: Tensor, parameter: Tensor) -> Tensor:
    return grad.to(parameter.dtype)
