"""Operators of the loop step: loop_step_fwd and loop_step_bwd by effkern._C, the same two by Triton."""

import torch
from torch import Tensor

from effkern import native
from effkern.ops import registry
from effkern.ops.loop_step.checks import OP

_library = torch.library.Library("effkern", "FRAGMENT")

# Streams are contiguous, [..., D]; factors and vectors float32 and packed (for Triton any dtype). A factor is its
# tensor, or the number in its place; beta as the number 0 is no term. What was not asked for comes as an empty tensor,
# and so does a state that is f itself.
_FACTORS = "Tensor? alpha, Tensor? beta, Tensor? state_scale, Tensor? input_scale, float[] numbers"
_FORWARD = (
    f"(Tensor f, Tensor h, Tensor? e, {_FACTORS}, Tensor? down, Tensor? up, Tensor? norm_weight, Tensor? embedding, "
    "bool norm, float eps, bool return_change) -> "
    "(Tensor state, Tensor core_input, Tensor change, Tensor rstd, Tensor own)"
)
# `own`: h A. `from_state`: the norm's y hat is state / norm_weight; otherwise it is made of f and h again. `wanted`: a
# bit per result.
_BACKWARD = (
    "(Tensor? grad_state, Tensor? grad_core_input, Tensor? f, Tensor? h, Tensor? e, Tensor? state, Tensor? rstd, "
    f"Tensor? own, {_FACTORS}, Tensor? down, Tensor? up, Tensor? norm_weight, bool norm, bool from_state, int wanted) "
    "-> (Tensor f, Tensor h, Tensor e, Tensor alpha, Tensor beta, Tensor state_scale, Tensor input_scale, Tensor down, "
    "Tensor up, Tensor norm_weight, Tensor embedding)"
)


def _fake_fwd(
    f, h, e, alpha, beta, state_scale, input_scale, numbers, down, up, norm_weight, embedding, norm, eps, return_change
):  # fmt: skip
    rows = h.numel() // h.shape[-1]
    is_f = alpha is beta is down is None and numbers[:2] == [1.0, 0.0] and not norm
    has_core_input = e is not None or embedding is not None or state_scale is not None or numbers[2] != 1.0
    return (
        h.new_empty(0) if is_f else torch.empty_like(h),
        torch.empty_like(h) if has_core_input else h.new_empty(0),
        h.new_empty(rows if return_change else 0, dtype=torch.float32),
        h.new_empty(rows if norm else 0, dtype=torch.float32),
        h.new_empty(0) if down is None else h.new_empty((rows, down.shape[1])),
    )


def _fake_bwd(
    grad_state, grad_core_input, f, h, e, state, rstd, own, alpha, beta, state_scale, input_scale, numbers, down, up,
    norm_weight, norm, from_state, wanted,
):  # fmt: skip
    like = grad_core_input if grad_state is None else grad_state
    dim = like.shape[-1]
    flags = [bool(wanted >> i & 1) for i in range(11)]

    def narrow(i: int, *shape: int) -> Tensor:
        return like.new_empty(shape if flags[i] else (0,), dtype=torch.float32)

    def width(factor: Tensor | None) -> int:
        return 1 if factor is None else factor.numel()

    factors = (alpha, beta, state_scale, input_scale)
    rank = 0 if down is None else down.shape[1]
    return (
        *(torch.empty_like(like) if flags[i] else like.new_empty(0) for i in range(3)),
        *(narrow(3 + i, width(factor)) for i, factor in enumerate(factors)),
        narrow(7, dim, rank), narrow(8, rank, dim), narrow(9, dim), narrow(10, dim),
    )  # fmt: skip


def _triton_fwd(*arguments):
    from effkern.ops.loop_step import triton

    return triton.forward(*arguments)


def _triton_bwd(*arguments):
    from effkern.ops.loop_step import triton

    return triton.backward(*arguments)


for _name, _schema, _fake, _triton in (
    ("fwd", _FORWARD, _fake_fwd, _triton_fwd),
    ("bwd", _BACKWARD, _fake_bwd, _triton_bwd),
):
    _library.define(f"loop_step_{_name}{_schema}")
    _library.define(f"loop_step_triton_{_name}{_schema}")
    _library.impl(f"loop_step_triton_{_name}", _triton, "CompositeExplicitAutograd")
    for _op in (f"effkern::loop_step_{_name}", f"effkern::loop_step_triton_{_name}"):
        torch.library.register_fake(_op, _fake, lib=_library)


native.load_on_first_call(_library, "loop_step_fwd", "loop_step_bwd")
registry.register(OP, registry.cpp(), registry.triton(), registry.reference())
