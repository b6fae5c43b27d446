"""Shampoo as a torch.optim.Optimizer."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from effkern.optim.shampoo import step as steps
from effkern.optim.shampoo.adamw import adamw_
from effkern.optim.shampoo.blocks import is_matrix
from effkern.optim.shampoo.failures import Watch
from effkern.optim.shampoo.options import Frequency, check_group, check_parameter
from effkern.optim.shampoo.state import Plan, build, expected_shapes, make_entry

# Options that decide which factors there are: they are fixed once a group has stepped.
_FIXED = ("side", "exponents", "accumulation", "block_size", "rule")


class Shampoo(torch.optim.Optimizer):
    """DOCSTRING"""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
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
            "root_method": root_method, "eps": eps, "max_failures": max_failures,
            "check_every": check_every,
        }  # fmt: skip
        self._reset()
        self.root_group, self._impl = root_group, impl
        super().__init__(params, defaults)

    def _reset(self) -> None:
        """What is made again from the state where it is missing."""
        self._plans: dict[int, tuple[tuple[Any, ...], Plan]] = {}
        self._watches: dict[int, Watch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_impl": self._impl}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A group of processes cannot be copied: a copy takes all its roots itself, with the same result.
        self.root_group, self._impl = getattr(self, "root_group", None), getattr(self, "_impl", "auto")
        self._reset()
        super().__setstate__(state)

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
        group = self.param_groups[number]
        key = tuple(group[name] for name in _FIXED)
        found = self._plans.get(number)
        if found is not None and len(group["params"]) == len(found[1].entries) + len(found[1].adamw):
            if found[0] != key:
                raise ValueError(
                    f"Shampoo: {', '.join(_FIXED)} of group {number} must stay as they were at its first step, got "
                    f"{key} after {found[0]}"
                )
            return found[1]
        check_group(group, warn=False)
        entries, plain = [], []
        for i, parameter in enumerate(group["params"]):
            if self.uses_shampoo(group, parameter):
                entries.append(make_entry(group, parameter, self._name(number, i), self.state[parameter]))
            else:
                plain.append((parameter, self.state[parameter]))
        plan = build(group, entries, plain)
        self._plans[number] = (key, plan)
        return plan

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; parameters without gradient stay as they are.

        Raises:
            TypeError: a gradient is sparse; nothing was changed.
            RuntimeError: a root or a gradient failed max_failures times in a row.
        """
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
        for number, group in enumerate(self.param_groups):
            plan = self._plan(number)
            adamw_(group, plan.adamw)
            work = steps.begin(plan, group, self.root_group, self._impl)
            if not work.live:
                continue
            steps.accumulate(work)
            steps.refresh(work)
            steps.update(work)
            watch = self._watches.setdefault(number, Watch())
            watch.check(steps.counters(plan), group["max_failures"], group["check_every"])
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
        """Take a state over; every tensor keeps the dtype it was saved in.

        Raises:
            ValueError: groups or shapes do not fit; nothing was changed.
        """
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [(n, i, p) for n, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])]
        if len(saved) == len(own):
            for key, (number, index, parameter) in zip(saved, own):
                group = {**self.param_groups[number], **state_dict["param_groups"][number]}
                self._check_state(group, parameter, self._name(number, index), state_dict["state"].get(key, {}))
        super().load_state_dict(state_dict)
        for key, (_, _, parameter) in zip(saved, own):
            # torch casts state to the parameter's dtype, which would round float32 factors of bfloat16 parameters.
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    where = value.device if name == "step" else parameter.device
                    self.state[parameter][name] = value.detach().to(where).clone()
        self._reset()

    def _check_state(self, group: dict[str, Any], parameter: Tensor, name: str, state: dict[str, Any]) -> None:
        if not state:
            return
        shapes = {key: tuple(parameter.shape) for key in ("momentum", "second_moment", "exp_avg", "exp_avg_sq")}
        if self.uses_shampoo(group, parameter):
            expected = expected_shapes(group, parameter)
            shapes |= expected
            missing = sorted(expected.keys() - state.keys())
            if missing:
                raise ValueError(f"Shampoo: state of {name} must hold {sorted(expected)}, got none for {missing}")
        # Those of the parameter's own shape first: their message says more.
        for key, value in sorted(state.items(), key=lambda item: item[0].startswith(("left", "right"))):
            if key in shapes and tuple(value.shape) != shapes[key]:
                raise ValueError(
                    f"Shampoo: state {key!r} of {name} must have shape {shapes[key]}, got {tuple(value.shape)}"
                )
            if key not in shapes and key != "step":
                raise ValueError(f"Shampoo: state of {name} must hold {sorted([*shapes, 'step'])}, got also {key!r}")
