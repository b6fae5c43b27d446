"""The op as an autograd function around looped_attention_fwd and looped_attention_bwd; only the inputs are kept."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """The last fields of Problem, and the implementation."""

    loops: int
    every_loop: bool
    form: str
    impl: str


def apply(options: Options, *tensors: Tensor | None) -> Tensor:
    """LoopedAttention.apply; without gradients the operator alone, which is cheaper to call."""
    if torch.is_grad_enabled():
        return LoopedAttention.apply(options, *tensors)
    return torch.ops.effkern.looped_attention_fwd(*tensors, *options)


class LoopedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, x, y, query, preconditioner, steps):
        ctx.options = options
        ctx.save_for_backward(x, y, query, preconditioner, steps)
        return torch.ops.effkern.looped_attention_fwd(x, y, query, preconditioner, steps, *options)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError("looped_linear_attention: create_graph=True is not covered: no second derivative")
        _, of_x, of_y, of_query, of_a, of_steps = ctx.needs_input_grad
        needs = (of_x or of_y or of_query, of_a, of_steps)
        grads = torch.ops.effkern.looped_attention_bwd(
            grad_outputs[0].contiguous(), *ctx.saved_tensors, *ctx.options, *needs
        )
        return (None, *(g if n else None for g, n in zip(grads, ctx.needs_input_grad[1:])))
