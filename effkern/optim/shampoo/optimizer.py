"""Shampoo as a torch.optim.Optimizer."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from effkern.optim.shampoo import step as steps
from effkern.optim.shampoo.blocks import is_matrix
from effkern.optim.shampoo.failures import Watch
from effkern.optim.shampoo.options import Frequency, as_floats, check_group, check_impl, check_parameter
from effkern.optim.shampoo.saved import ORDER, check_groups, check_state
from effkern.optim.shampoo.state import Plan, build, make_entry

# Options that decide which factors there are: they are fixed once a group has stepped.
_FIXED = ("side", "exponents", "accumulation", "block_size", "rule")


class Shampoo(torch.optim.Optimizer):
    """Shampoo with free sides and exponents; what is no matrix is stepped by AdamW.

    For every block G [m, n] of the gradient, with M and the factors zero at the start:

        L <- beta2 L + (1 - beta2) G G^T        R <- beta2 R + (1 - beta2) G^T G        on the sides in use
        M <- beta1 M + (1 - beta1) G
        U = c (L + ridge lambda_max(L) I)^-a M (R + ridge lambda_max(R) I)^-b
        W <- (1 - lr weight_decay) W - lr g U

    c is the bias correction of M, L and R, g the grafting factor (grafting.py). Negative eigenvalues are clamped at 0
    before the ridge is added. A block without a root yet moves along M.

    A convolution [o, i, ..] is a matrix o x (i ..); so is a stack of matrices [e, m, n], which is better passed as e
    parameters. Matrices are cut into blocks of at most block_size along the sides
    in use, each with factors and grafting of its own; a side not in use is not cut. Blocks of one shape of all
    parameters of a group share their calls.

    Args:
        params: parameters, named parameters, or groups with options of their own; float32/bfloat16/float16/float64.
        lr: >= 0, a number or a tensor of one number.
        betas: of M (0: no momentum is kept) and of L and R.
        side: "auto" (the smaller one, left where they are equal), "left", "right" or "both".
        exponents: (a, b), or one number for the sides in use. None: 1/2 on one side, 1/4 on both, 1/2 on both with
            "kl". Other sums than that are allowed, with a warning.
        accumulation: "ema" as above; "sum" L + G G^T; "weighted" beta2 L + G G^T; "kl" (both sides) G R^-1 G^T / n and
            G^T L^-1 G / m in place of G G^T and G^T G, with the roots of the step before (KL-Shampoo; exact for
            exponents 1/2).
        bias_correction: of M, and of L and R under "ema" and "kl".
        weight_decay: decoupled, >= 0.
        grafting: "none", "rms" (the root mean square of g U is graft_scale), "sgd", "adagrad", "rmsprop", "adam".
        ridge: >= 0, relative to the largest eigenvalue of the factor. With 0 a factor without full rank makes steps of
            any size out of rounding errors: pseudo_inverse is for that.
        pseudo_inverse: eigenvalues up to this part of the largest are left out instead; None: none is.
        block_size: >= 1.
        precondition_frequency: steps between two roots, or a schedule ((1, f1), (step2, f2), ..): f2 from step2 on.
            Roots are taken at start_step and at multiples of the frequency. On the CPU a block whose gradients were
            all zero by then gets its root with its first gradient; on a device, which is not waited for, at the next
            multiple, and moves along M until then.
        start_step: before it the grafted method alone steps, while the factors gather.
        rule: "auto" gives Shampoo what has two rows and two columns at least and AdamW the rest; "shampoo" refuses the
            rest; "adamw" gives everything to AdamW.
        root_method: of effkern.ops.shampoo.inverse_root; "auto" is "eigh" for float64 parameters, and else what is
            fast, to some 1e-3.
        adamw_betas: of what AdamW steps; the second also of grafting's second moment.
        eps: of AdamW and of grafting.
        max_failures, check_every: below.
        root_group: a group of processes that hold the same factors (torch.distributed.group.WORLD under DDP): each
            takes its share of the roots and they are gathered. None: every process takes all.
        impl: of the ops, "auto", "cpp", "triton" or "reference".

    Failures: a block whose gradient is not finite keeps factor, root, momentum and weight; a root that fails leaves the
    one before. Either warns once with the parameter's name and raises RuntimeError after max_failures in a row. On the
    CPU counters are read after each step; on a device every check_every steps, without waiting for it. What AdamW
    steps in a group stays as it is, all of it, where one of its gradients is not finite. A step that a matrix keeps out
    of still counts for its bias correction; that matters for grafting "none" in the first steps alone.

    State: momentum (second moment) in float32 and 2 p^2 float32 per block and side; float64 for float64 parameters.
    Frozen parameters have none. Memory beside it: at most one batch of blocks of one shape with grafting "none" and
    "rms", two with "kl", up to eight with the other graftings, before start_step, and for shards (docs/shampoo.md).
    Parameters may change their strides between steps: the state follows, but for right factors that are cut, of a
    weight of three or more dimensions. DTensors may be cut along one mesh dimension by Shard. Deterministic.

    Raises:
        ValueError: an option breaks a rule, or a weight is no matrix in memory.
        TypeError: a parameter is complex, integer or sparse.

    Source: Gupta, Koren, Singer 2018 (arXiv 1802.09568); Xie et al. (arXiv 2503.10537); AdamW-style: arXiv 2601.07326;
    grafting: Anil et al. (arXiv 2002.09018); KL-Shampoo: arXiv 2509.03378. SOAP is not covered.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.8),
        *,
        side: Literal["auto", "left", "right", "both"] = "auto",
        exponents: float | tuple[float, float] | None = None,
        accumulation: Literal["ema", "sum", "weighted", "kl"] = "ema",
        bias_correction: bool = True,
        weight_decay: float = 0.0,
        grafting: Literal["none", "rms", "sgd", "adagrad", "rmsprop", "adam"] = "rms",
        graft_scale: float = 0.2,
        ridge: float = 1e-6,
        pseudo_inverse: float | None = None,
        block_size: int = 1024,
        precondition_frequency: Frequency = 1,
        start_step: int = 1,
        rule: Literal["auto", "shampoo", "adamw"] = "auto",
        root_method: Literal["auto", "rational", "eigh", "polar_express", "gram_ns", "coupled_newton"] = "auto",
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        max_failures: int = 3,
        check_every: int = 10,
        root_group: Any = None,
        impl: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "side": side, "exponents": exponents, "accumulation": accumulation,
            "bias_correction": bias_correction, "weight_decay": weight_decay, "grafting": grafting,
            "graft_scale": graft_scale, "ridge": ridge, "pseudo_inverse": pseudo_inverse, "block_size": block_size,
            "precondition_frequency": precondition_frequency, "start_step": start_step, "rule": rule,
            "root_method": root_method, "adamw_betas": adamw_betas, "eps": eps, "max_failures": max_failures,
            "check_every": check_every,
        }  # fmt: skip
        check_impl(impl)
        self._reset()
        self.root_group, self._impl = root_group, impl
        super().__init__(params, defaults)

    def _reset(self) -> None:
        """What is made again from the state where it is missing."""
        self._plans: dict[int, tuple[tuple[Any, ...], tuple[Any, ...], Plan]] = {}
        self._watches: dict[int, Watch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_impl": self._impl}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A group of processes cannot be copied: a copy takes all its roots itself, with the same result.
        self.root_group, self._impl = getattr(self, "root_group", None), getattr(self, "_impl", "auto")
        self._reset()
        super().__setstate__(state)
        # torch puts it there, for optimizers that have such an option; a state saved before would lack it.
        self.defaults.pop("differentiable", None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Like torch's; the group may have any option of the constructor but root_group and impl.

        Raises:
            ValueError, TypeError: an option or a parameter breaks a rule; the optimizer is as it was.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            for i, parameter in enumerate(group["params"]):
                name = self._name(len(self.param_groups) - 1, i)
                check_parameter(parameter, name)
                if group["rule"] == "shampoo" and not is_matrix(tuple(parameter.shape)):
                    raise ValueError(
                        f"Shampoo: {name} must have two rows and two columns at least under rule='shampoo', got shape "
                        f"{tuple(parameter.shape)}"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _name(self, group: int, index: int) -> str:
        """The parameter's name where the optimizer was given names, else its place."""
        names = self.param_groups[group].get("param_names")
        if names is not None:
            return str(names[index])
        shape = tuple(self.param_groups[group]["params"][index].shape)
        return f"parameter {index} of group {group}, shape {shape},"

    def uses_shampoo(self, group: dict[str, Any], parameter: Tensor) -> bool:
        """By the group's rule: "auto" takes what has at least two rows and two columns; AdamW steps the rest."""
        return group["rule"] != "adamw" and is_matrix(tuple(parameter.shape))

    def _plan(self, number: int) -> Plan:
        """What a step of the group does; made again where its parameters, or how they lie in memory, have changed."""
        group = self.param_groups[number]
        check_group(group, warn=False)
        # Frozen parameters cost no memory before they have a gradient.
        members = [p.requires_grad or p.grad is not None or p in self.state for p in group["params"]]
        key = tuple((id(p), use, p.shape, p.stride(), p.dtype, p.device) for p, use in zip(group["params"], members))
        options = tuple(group[name] for name in _FIXED)
        found = self._plans.get(number)
        if found is not None and found[0] == key:
            if found[1] != options:
                raise ValueError(
                    f"Shampoo: {', '.join(_FIXED)} of group {number} must stay as they were at its first step, got "
                    f"{options} after {found[1]}"
                )
            return found[2]
        entries, plain = [], []
        for i, (parameter, use) in enumerate(zip(group["params"], members)):
            if not use:
                continue
            name, state, is_ours = self._name(number, i), self.state[parameter], self.uses_shampoo(group, parameter)
            check_state(group, parameter, name, state, uses_shampoo=is_ours, complete=False)
            if is_ours:
                entries.append(make_entry(group, parameter, name, state))
            else:
                plain.append((name, parameter, state))
        plan = build(group, entries, plain)
        self._plans[number] = (key, options, plan)
        return plan

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without gradient stay as they are.

        Raises:
            TypeError: a gradient is sparse; nothing was changed.
            ValueError: an option breaks a rule by now, or a weight is no matrix in memory; nothing was changed.
            RuntimeError: a root or a gradient failed max_failures times in a row; all else has taken the step. Or a
                CUDA graph is being captured, which would repeat the host's numbers of this one step.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "Shampoo: step must not be captured in a CUDA graph, as the host counts steps and says when roots are "
                "due; effkern.ops.shampoo.gram_ema_ and apply_ can be"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    raise TypeError(
                        f"Shampoo: gradient of {self._name(number, i)} must be dense, got {parameter.grad.layout}"
                    )
        plans = [self._plan(number) for number in range(len(self.param_groups))]
        self._plans = {number: self._plans[number] for number in range(len(plans))}
        for group, plan in zip(map(as_floats, self.param_groups), plans):
            for some in plan.plain:
                some.step_(group)
            work = steps.begin(plan, group, self.root_group, self._impl)
            if work.live:
                steps.accumulate(work)
                steps.refresh(work)
                steps.update(work)
                steps.touch(work)
        for number, (group, plan) in enumerate(zip(self.param_groups, plans)):
            watch = self._watches.setdefault(number, Watch())
            watch.check(partial(steps.counters, plan), plan.on_cpu, group["max_failures"], group["check_every"])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Like torch's. Factors and roots are copies: in the optimizer they are parts of larger stacks.

        state[i]: "step", "momentum" (and "second_moment") of the parameter's shape, "left", "left_root" [blocks, m, m],
        "right", "right_root" [blocks, n, n]; a suffix ".1" .. for shorter blocks at the edge. AdamW's: "step",
        "exp_avg", "exp_avg_sq".
        """
        found = super().state_dict()
        found["state"] = {
            i: {k: v.clone() if k.startswith(("left", "right")) else v for k, v in state.items()}
            for i, state in found["state"].items()
        }
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state over; a tensor keeps the dtype it was saved in until its parameter steps.

        Failures in a row are no part of the state: they are counted from 0 again.

        Raises:
            ValueError: groups, options or shapes do not fit, or something is missing; nothing was changed.
        """
        taken: dict[str, Any] = {}

        def take(_: Any, state: dict[str, Any]) -> None:
            self._check_saved(state)
            taken.update(state)

        # After the user's own hooks, so that what they made of the state is what is checked and taken.
        handle = self.register_load_state_dict_pre_hook(take)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for keys, group in zip(taken["param_groups"], self.param_groups):
            for key, parameter in zip(keys["params"], group["params"]):
                # torch casts state to the parameter's dtype, which would round float32 factors of bfloat16 parameters.
                for name, value in taken["state"].get(key, {}).items():
                    counts = name == "step" and self.uses_shampoo(group, parameter)
                    where = torch.device("cpu") if counts or name == ORDER else parameter.device
                    self.state[parameter][name] = value.detach().to(where).clone()
        self._reset()

    def _check_saved(self, saved: dict[str, Any]) -> None:
        """Numbers of groups and of their parameters are torch's to compare."""
        groups = saved["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return
        check_groups(self.defaults, groups)
        for number, (own, other) in enumerate(zip(self.param_groups, groups)):
            for i, (parameter, key) in enumerate(zip(own["params"], other["params"])):
                ours, state = self.uses_shampoo(other, parameter), saved["state"].get(key, {})
                check_state(other, parameter, self._name(number, i), state, uses_shampoo=ours)
