"""The fused loop step as an autograd function around its two operators."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.ops.loop_step.checks import OP


class Options(NamedTuple):
    """What is no tensor."""

    impl: str
    numbers: tuple[float, float, float, float]
    """alpha, beta, state_scale, input_scale where they are numbers."""
    norm: bool
    eps: float
    return_change: bool
    save_branch: bool
    """Backward makes the norm's y hat of f and h again."""
    keeps_f: bool
    """s is f itself, and the operator's state empty."""
    has_core_input: bool


# The tensors of apply, in its order; those of the operators' results too.
_NAMES = ("f", "h", "e", "alpha", "beta", "state_scale", "input_scale", "down", "up", "norm_weight", "embedding")
_BIT = {name: 1 << i for i, name in enumerate(_NAMES)}


def apply(options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """LoopStep.apply; without gradients the operator alone. See the operators for the results."""
    return LoopStep.apply(options, *tensors) if torch.is_grad_enabled() else _forward(options, *tensors)[:3]


def _small(impl: str, dtype: torch.dtype, *tensors: Tensor | None) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Factors and vectors as the operators take them, and the matrices."""
    *vectors, down, up = tensors
    kind = torch.float32 if impl == "cpp" else None
    packed = [None if t is None else fitted(t, kind or t.dtype) for t in vectors]
    return packed, [None if t is None else t.to(dtype) for t in (down, up)]


def fitted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x contiguous in `dtype`. Calls that change nothing are left out, as each costs half a microsecond."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _forward(options: Options, f, h, e, alpha, beta, state_scale, input_scale, down, up, norm_weight, embedding):
    packed, matrices = _small(
        options.impl, h.dtype, alpha, beta, state_scale, input_scale, norm_weight, embedding, down, up
    )  # fmt: skip
    operator = torch.ops.effkern.loop_step_fwd if options.impl == "cpp" else torch.ops.effkern.loop_step_triton_fwd
    return operator(
        f, h, e, *packed[:4], options.numbers, *matrices, *packed[4:], options.norm, options.eps, options.return_change
    )  # fmt: skip


def _like(grad: Tensor, t: Tensor) -> Tensor:
    return grad if grad.dtype == t.dtype and grad.shape == t.shape else grad.to(t.dtype).view(t.shape)


class LoopStep(torch.autograd.Function):
    """Returns state, core_input and change; the latter two empty where there is none."""

    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        state, core_input, change, rstd, own = _forward(options, *tensors)
        f, h, e, *rest = tensors
        needs = dict(zip(_NAMES, ctx.needs_input_grad[1:]))
        has_beta = rest[1] is not None or options.numbers[1] != 0.0
        # Where f and h stay anyway, s~ costs no memory, and reading s is spared.
        stays = needs["alpha"] and (needs["beta"] or not has_beta)
        from_state = options.norm and not options.save_branch and not stays
        again = options.norm and not from_state
        ctx.options, ctx.from_state, ctx.has_beta = options, from_state, has_beta
        ctx.save_for_backward(
            f if needs["alpha"] or again else None,
            h if needs["beta"] or needs["down"] or (again and has_beta) else None,
            e if needs["input_scale"] else None,
            (f if options.keeps_f else state) if from_state or needs["state_scale"] else None,
            rstd if options.norm else None,
            own if needs["up"] or (again and rest[4] is not None) else None,
            *rest,
        )
        ctx.mark_non_differentiable(change)
        ctx.set_materialize_grads(False)
        return state, core_input, change

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(f"{OP}: create_graph=True is covered by impl='reference' alone")
        # Read once: a checkpoint unpacks only once.
        f, h, e, state, rstd, own, *rest = ctx.saved_tensors
        alpha, beta, state_scale, input_scale, down, up, norm_weight, _ = rest
        grad_state, grad_core_input = (None if g is None else g.contiguous() for g in grad_outputs[:2])
        options: Options = ctx.options
        # A traced call sends zeros where eager sends none.
        grad_state = None if options.keeps_f else grad_state
        grad_core_input = grad_core_input if options.has_core_input else None
        if grad_state is None and grad_core_input is None:
            return (None,) * (len(_NAMES) + 1)
        wanted = {name for name, needed in zip(_NAMES, ctx.needs_input_grad[1:]) if needed}
        if not ctx.has_beta and down is None:
            wanted.discard("h")
        if grad_core_input is None:
            wanted -= {"e", "state_scale", "input_scale", "embedding"}
        # A factor of 1 passes the gradient on as it is.
        passed = {"e"} if input_scale is None and options.numbers[3] == 1.0 else set()
        if options.keeps_f and state_scale is None and options.numbers[2] == 1.0:
            passed.add("f")
        passed &= wanted
        asked = wanted - passed
        like = grad_core_input if grad_state is None else grad_state
        assert like is not None
        packed, matrices = _small(
            options.impl, like.dtype, alpha, beta, state_scale, input_scale, norm_weight, down, up
        )  # fmt: skip
        operator = torch.ops.effkern.loop_step_bwd if options.impl == "cpp" else torch.ops.effkern.loop_step_triton_bwd
        grads: list[Tensor | None] = [None] * len(_NAMES)
        if asked:
            found = operator(
                grad_state, grad_core_input, f, h, e, state, rstd, own, *packed[:4], options.numbers, *matrices,
                packed[4], options.norm, ctx.from_state, sum(_BIT[name] for name in asked),
            )  # fmt: skip
            for i, (name, t) in enumerate(zip(_NAMES, (None, None, None, *rest))):
                if name in asked:
                    grads[i] = found[i] if t is None else _like(found[i], t)
        for name in passed:
            grads[_NAMES.index(name)] = grad_core_input
        return None, *grads
