"""What one loop computes, as a function of one carried tensor.

core_input x_t -> f = core(x_t) -> state h_{t+1} = residual and norm of f, h_t -> core_input x_{t+1} = injection into it

What is carried from loop to loop, and kept for backward, is one tensor: the core's input where the new state needs no
h_t; then residual, norm and injection are one pass over memory. Else it is h_t, and the injection is a pass of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effkern.ops.loop_step import LoopStepOutput, loop_step

OP = "LoopedBlock"

# One loop's share of what differs from loop to loop, and what all loops share.
LoopPart = dict[str, Any]
Shared = dict[str, Any]


class Plan(NamedTuple):
    """All that a call's loops read besides the carried tensor and the parameters of core and norm: nested tensors."""

    shared: Shared
    """args, kwargs; e, state_scale, input_scale, mix; alpha, beta, low_rank; norm_weight; x0. Each if it is there."""
    loops: list[LoopPart]
    """embedding, scalars, each (a dict of keyword arguments for every layer); alpha and beta that change."""


class Body(NamedTuple):
    """The fixed side of a looped block."""

    core: Callable[..., Any] | None
    """None: `layers` are applied one after the other."""
    layers: Sequence[nn.Module]
    norm_module: nn.Module | None
    norm: bool
    eps: float
    scalar_use: str
    loop_argument: str | None
    check_finite: bool
    carries_state: bool = True
    """h_t is what goes from loop to loop, and not x_t."""
    only_adds: bool = False
    """x_t is h_t + e, and no norm or residual comes before: torch's own sum, which copies no gradient, is best then."""
    impl: str = "auto"
    """Of loop_step."""

    @classmethod
    def of(cls, plan: Plan, **fixed: Any) -> "Body":
        """With what the plan says about all loops."""
        # Sets both: torch 2.11 compiles no operation between a set and a dictionary's keys.
        shared, own = set(plan.shared), set().union(*plan.loops)
        uses_h = bool({"low_rank", "beta"} & (shared | own)) or "mix" in shared
        injects = bool({"e", "state_scale"} & shared) or "embedding" in own
        others = {"state_scale", "alpha", "beta", "low_rank", "norm_weight", "mix", "embedding"}
        only_adds = "e" in shared and not others & (shared | own)
        return cls(**fixed, carries_state=uses_h or not injects, only_adds=only_adds)

    def enter(self, plan: Plan, t: int, h: Tensor) -> Tensor:
        """x_t of h_t."""
        shared, part = plan.shared, plan.loops[t]
        if "mix" in shared:
            x = torch.nn.functional.linear(h, shared["mix"].to(h.dtype)) + shared["e"]
            return x if "embedding" not in part else x + part["embedding"].to(x.dtype)
        entering = _entering(shared, part)
        if not entering:
            return h
        if self.only_adds:
            return h + shared["e"]
        return loop_step(h, h, impl=self.impl, **entering).core_input

    def loop(
        self, plan: Plan, t: int, carry: Tensor, *, start: bool = True, stop: bool = True, by_layer: bool = False
    ) -> tuple[Tensor, Tensor]:
        """h_{t+1} and what is carried into loop t + 1.

        start, stop: what comes in, and what is carried on, is the state in any case. by_layer: layers are checkpointed.
        """
        whole = self.carries_state
        x = self.enter(plan, t, carry) if whole or start else carry
        f = self.apply_core(plan, t, x, by_layer)
        if self.norm_module is None and not whole and not stop and not self.only_adds:
            entering = _entering(plan.shared, plan.loops[t + 1])
            out = loop_step(f, x, norm=self.norm, eps=self.eps, impl=self.impl, **self.terms(plan, t), **entering)
            return out.state, out.core_input
        state = self.leave(plan, t, f, carry).state
        if whole or stop:
            return state, state
        return state, self.enter(plan, t + 1, state)

    def terms(self, plan: Plan, t: int) -> dict[str, Any]:
        """Of the residual and the norm, those that are there."""
        names = ("alpha", "beta", "low_rank", "norm_weight")
        both = {**plan.shared, **plan.loops[t]}
        return {k: both[k] for k in names if k in both}

    def leave(self, plan: Plan, t: int, f: Tensor, h: Tensor, change: bool = False) -> LoopStepOutput:
        """h_{t+1} of the core's output."""
        terms = self.terms(plan, t)
        changed_here = change and self.norm_module is None
        state, moved = f, None
        if self.norm or terms or changed_here:
            options = {"norm": self.norm, "eps": self.eps, "return_change": changed_here, "impl": self.impl}
            state, _, moved = loop_step(f, h, **options, **terms)  # type: ignore[arg-type]
        if self.norm_module is not None:
            state = self.norm_module(state)
            _check_output("norm", state, h)
            state = state.to(h.dtype)
            if change:
                moved = loop_step(state, h, return_change=True).change
        return LoopStepOutput(state, state, moved)

    def apply_core(self, plan: Plan, t: int, x: Tensor, by_layer: bool = False) -> Tensor:
        """The core's output, checked, in x's dtype."""
        shared, part = plan.shared, plan.loops[t]
        args, kwargs = shared["args"], shared["kwargs"]
        if self.loop_argument is not None:
            kwargs = {**kwargs, self.loop_argument: t}
        each = part.get("each")
        if self.core is not None:
            f = self.core(x, *args, **(kwargs if each is None else {**kwargs, **each[0]}))
            _check_output("core", f, x)
            return f.to(x.dtype)
        z = x
        for i, layer in enumerate(self.layers):
            extra = kwargs if each is None else {**kwargs, **each[i]}
            scalars = part["scalars"][i] if "scalars" in part else None
            if by_layer and torch.is_grad_enabled():
                z = checkpoint(
                    self.apply_layer, i, layer, z, scalars, shared.get("x0"), args, extra, use_reentrant=False
                )
            else:
                z = self.apply_layer(i, layer, z, scalars, shared.get("x0"), args, extra)
        return z

    def apply_layer(
        self, i: int, layer: nn.Module, z: Tensor, scalars: Tensor | None, x0: Tensor | None, args: Any, kwargs: Any
    ) -> Tensor:
        """One layer, with its scalars of this loop."""
        if scalars is not None and self.scalar_use == "argument":
            kwargs = {**kwargs, "scale": scalars}
        if scalars is not None and self.scalar_use == "stream":
            z = loop_step(z, z, x0, state_scale=scalars[0], input_scale=scalars[1], impl=self.impl).core_input
        y = layer(z, *args, **kwargs)
        _check_output(f"core[{i}]", y, z)
        y = y.to(z.dtype)
        if scalars is not None and self.scalar_use == "increment":
            share = scalars.to(torch.promote_types(scalars.dtype, z.dtype))
            y = loop_step(y, z, alpha=share, beta=1 - share, impl=self.impl).state
        return y


def _entering(shared: Shared, part: LoopPart) -> dict[str, Any]:
    names = ("e", "state_scale", "input_scale")
    return {k: shared[k] for k in names if k in shared} | {k: part[k] for k in ("embedding",) if k in part}


def _check_output(name: str, y: Any, x: Tensor) -> None:
    if not isinstance(y, Tensor):
        what = f"a {type(y).__name__} of {len(y)}" if isinstance(y, (tuple, list)) else f"a {type(y).__name__}"
        raise TypeError(f"{OP}: {name} must return one tensor, got {what}")
    if y.shape != x.shape:
        raise ValueError(f"{OP}: {name} must keep the shape {tuple(x.shape)}, got {tuple(y.shape)}")
    if not y.is_floating_point():
        raise TypeError(f"{OP}: {name} must return a floating dtype, got {y.dtype}")
