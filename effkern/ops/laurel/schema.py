"""Operators of the residual: laurel_fwd and laurel_bwd, by the driver or by Triton, and the driver's passes in C++."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.laurel import driver
from effkern.ops.laurel.passes import Passes

_library = torch.library.Library("effkern", "FRAGMENT")

# The fields of driver.Problem, in its order.
_PROBLEM = (
    "Tensor x, Tensor? weights, Tensor? down, Tensor? up, Tensor? past, Tensor? low_rank_weight, Tensor[] addends, "
    "Tensor? coefficients, Tensor? norm_weight, str scalar_map, float scale, float low_rank_eps, float norm_eps"
)
_library.define(
    f"laurel_fwd(Tensor branch, {_PROBLEM}, str impl) -> (Tensor y, Tensor normed, Tensor own, Tensor rstd)"
)
_library.define(
    f"laurel_bwd(Tensor? branch, {_PROBLEM}, str impl, Tensor? y, Tensor? own, Tensor? rstd, Tensor? grad_y, "
    "Tensor? grad_normed, Tensor? grad_own) -> (Tensor branch, Tensor x, Tensor weights, Tensor down, Tensor up, "
    "Tensor past, Tensor low_rank_weight, Tensor coefficients, Tensor norm_weight, Tensor[] addends)"
)
# The fields of passes.ForwardPass and BackwardPass.
_library.define(
    "laurel_forward_chunks_(Tensor branch, Tensor x, Tensor? down, Tensor? up, Tensor? past, Tensor? gram, "
    "float low_rank_eps, Tensor[] addends, Tensor alpha, Tensor beta, Tensor? coefficients, Tensor? norm_weight, "
    "float norm_eps, Tensor(a!) y, Tensor(b!)? own, Tensor(c!)? normed, Tensor(d!)? rstd) -> ()"
)
_library.define(
    "laurel_backward_chunks_(Tensor? grad_y, Tensor? grad_normed, Tensor? grad_own, Tensor x, Tensor? y, "
    "Tensor? branch, Tensor? own, Tensor? rstd, Tensor? down, Tensor? up, Tensor? past, Tensor? gram, "
    "float low_rank_eps, Tensor[] addends, Tensor alpha, Tensor beta, Tensor? coefficients, Tensor? norm_weight, "
    "Tensor(a!) grad_branch, Tensor(b!) grad_x, Tensor(c!)[] grad_addends, Tensor(d!)? sums, "
    "Tensor(e!)? grad_norm_weight, Tensor(f!)? grad_down, Tensor(g!)? grad_up, Tensor(h!)? grad_gram, "
    "Tensor(i!)? grad_past) -> ()"
)
# Passes.scaled_up and up_grads: scaled = up (low_rank_weight) (beta).
_library.define("laurel_scale_up_(Tensor(a!) scaled, Tensor up, Tensor? low_rank_weight, Tensor? beta) -> ()")
# of_scaled [1] or [D] = sum of up grad_scaled over all, or over the rows; grad_up = beta grad_scaled.
_library.define(
    "laurel_up_grads_(Tensor up, Tensor grad_scaled, Tensor beta, Tensor(a!) grad_up, Tensor(b!)? of_scaled) -> ()"
)


def _passes(impl: str) -> Passes:
    if impl == "cpp":
        from effkern.ops.laurel.cpp import PASSES
    else:
        from effkern.ops.laurel.chunks import PASSES
    return PASSES


def _given(x: Tensor, *optional: Tensor | None) -> list[Tensor]:
    """An empty tensor of its own for each that is missing: an operator's results are tensors."""
    return [x.new_empty(0) if t is None else t for t in optional]


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """The products have their types already."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _forward(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *problem, impl = arguments
    # A compiled package (AOTInductor) gives None for a list without tensors.
    problem[7] = tuple(problem[7] or ())
    p = driver.Problem(*problem)
    # The products have their types already.
    with _without_autocast(p.x_ND):
        if impl == "triton":
            from effkern.ops.laurel import triton

            y, *rest = triton.forward(p)
        else:
            y, *rest = driver.forward(p, _passes(impl))
    normed, own, rstd = _given(y, *rest)
    return y, normed, own, rstd


def _backward(*arguments) -> tuple:
    *problem, impl, y, own, rstd, grad_y, grad_normed, grad_own = arguments
    problem[7] = tuple(problem[7] or ())
    p = driver.Problem(*problem)
    with _without_autocast(p.x_ND):
        result = driver.Result(y, None, own, rstd)
        if impl == "triton":
            from effkern.ops.laurel import triton

            grads = triton.backward(p, result, grad_y, grad_normed, grad_own)
        else:
            grads = driver.backward(p, result, grad_y, grad_normed, grad_own, _passes(impl))
    branch, x, weights, down, up, *small, addends, coefficients, norm_weight = grads
    down, up = _as(down, p.down_DS), _as(up, p.up_RD)
    return (branch, x, *_given(x, weights, down, up, *small, coefficients, norm_weight), list(addends))


def _as(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)


_library.impl("laurel_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("laurel_bwd", _backward, "CompositeExplicitAutograd")


def _acc(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.register_fake("effkern::laurel_fwd", lib=_library)
def _fake_fwd(*arguments):
    p = driver.Problem(*arguments[:-1])
    x = p.x_ND
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return (
        y,
        x.new_empty(0) if p.norm_weight_D is None else torch.empty_like(y),
        x.new_empty(0) if p.down_DS is None else x.new_empty((x.shape[0], p.down_DS.shape[1])),
        x.new_empty(0) if p.norm_weight_D is None else x.new_empty(x.shape[0], dtype=_acc(x)),
    )


@torch.library.register_fake("effkern::laurel_bwd", lib=_library)
def _fake_bwd(*arguments):
    p = driver.Problem(*arguments[:14])
    x, acc = p.x_ND, _acc(p.x_ND)

    def like(t: Tensor | None, dtype: torch.dtype | None = acc) -> Tensor:
        return x.new_empty(0) if t is None else x.new_empty(t.shape, dtype=dtype or t.dtype)

    past = x.new_empty(0) if p.past_NP is None else torch.empty_like(p.past_NP)
    return (
        torch.empty_like(x), torch.empty_like(x), like(p.weights), like(p.down_DS, None), like(p.up_RD, None), past,
        like(p.low_rank_weight_D), like(p.coefficients), like(p.norm_weight_D),
        [torch.empty_like(e) for e in p.addends],
    )  # fmt: skip


@torch.library.register_fake("effkern::laurel_forward_chunks_", lib=_library)
def _fake_forward_chunks(*args) -> None:
    return None


@torch.library.register_fake("effkern::laurel_backward_chunks_", lib=_library)
def _fake_backward_chunks(*args) -> None:
    return None


@torch.library.register_fake("effkern::laurel_scale_up_", lib=_library)
def _fake_scale_up(*args) -> None:
    return None


@torch.library.register_fake("effkern::laurel_up_grads_", lib=_library)
def _fake_up_grads(*args) -> None:
    return None


registry.register("laurel_residual", registry.cpp(), registry.triton(), registry.reference())
