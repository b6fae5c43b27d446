"""Operators: looped_attention_fwd and looped_attention_bwd by any implementation, and the two of the C++ kernels."""

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.looped_linear_attention.problem import FORMS, Grads, Needs, Problem

_library = torch.library.Library("effkern", "FRAGMENT")

# The fields of problem.Problem.
_PROBLEM = (
    "Tensor x, Tensor y, Tensor query, Tensor preconditioner, Tensor? steps, int loops, bool every_loop, str form"
)
_library.define(f"looped_attention_fwd({_PROBLEM}, str impl) -> Tensor")
_library.define(
    f"looped_attention_bwd(Tensor grad, {_PROBLEM}, str impl, bool data, bool of_preconditioner, bool of_steps) -> "
    "(Tensor x, Tensor y, Tensor query, Tensor preconditioner, Tensor steps)"
)
# What effkern._C implements, the form as its place in problem.FORMS: results are written; in backward those that are
# missing are not computed.
_NATIVE = _PROBLEM.replace("str form", "int form")
_library.define(f"looped_attention_forward_({_NATIVE}, Tensor(a!) predictions) -> ()")
_library.define(
    f"looped_attention_backward_(Tensor grad, {_NATIVE}, Tensor(a!)? grad_x, Tensor(b!)? grad_y, "
    "Tensor(c!)? grad_query, Tensor(d!)? grad_preconditioner, Tensor(e!)? grad_steps) -> ()"
)


def _forward(*arguments) -> Tensor:
    *problem, impl = arguments
    p = Problem(*problem)
    with torch.autocast(p.x_BND.device.type, enabled=False):
        if impl == "cpp":
            predictions = p.x_BND.new_empty(_predictions(p))
            torch.ops.effkern.looped_attention_forward_(*_native(p), predictions)
            return predictions
        if impl == "triton":
            from effkern.ops.looped_linear_attention import triton

            return triton.forward(p)
        from effkern.ops.looped_linear_attention import plain

        return plain.forward(p)


def _backward(grad: Tensor, *arguments) -> tuple[Tensor, ...]:
    *problem, impl, data, of_preconditioner, of_steps = arguments
    p, needs = Problem(*problem), Needs(data, of_preconditioner, of_steps)
    with torch.autocast(p.x_BND.device.type, enabled=False):
        if impl == "cpp":
            grads = _empty_grads(p, needs)
            torch.ops.effkern.looped_attention_backward_(grad, *_native(p), *grads)
        elif impl == "triton":
            from effkern.ops.looped_linear_attention import triton

            grads = triton.backward(p, grad, needs)
        else:
            from effkern.ops.looped_linear_attention import plain

            grads = plain.backward(p, grad, needs)
    # An operator's results are tensors.
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


def _native(p: Problem) -> tuple:
    return (*p[:-1], FORMS.index(p.form))


def _predictions(p: Problem) -> tuple[int, int, int]:
    return (p.loops if p.every_loop else 1, p.x_BND.shape[0], p.query_BMD.shape[1])


def _empty_grads(p: Problem, needs: Needs) -> Grads:
    of_x, of_y, of_query = (torch.empty_like(t) if needs.data else None for t in (p.x_BND, p.y_BN, p.query_BMD))
    return Grads(
        of_x,
        of_y,
        of_query,
        torch.empty_like(p.preconditioner) if needs.preconditioner else None,
        p.x_BND.new_empty(p.loops) if needs.steps else None,
    )


_library.impl("looped_attention_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("looped_attention_bwd", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("effkern::looped_attention_fwd", lib=_library)
def _fake_fwd(*arguments) -> Tensor:
    p = Problem(*arguments[:-1])
    return p.x_BND.new_empty(_predictions(p))


@torch.library.register_fake("effkern::looped_attention_bwd", lib=_library)
def _fake_bwd(grad: Tensor, *arguments) -> tuple[Tensor, ...]:
    *problem, _, data, of_preconditioner, of_steps = arguments
    p = Problem(*problem)
    grads = _empty_grads(p, Needs(data, of_preconditioner, of_steps))
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake("effkern::looped_attention_forward_", lib=_library)
def _fake_forward(*arguments) -> None:
    return None


@torch.library.register_fake("effkern::looped_attention_backward_", lib=_library)
def _fake_backward(*arguments) -> None:
    return None


registry.register("looped_linear_attention", registry.cpp(), registry.triton(), registry.reference())
