"""What all optimizers of LoRA pairs share: groups of pairs, checks, which pairs take part in a step, exact state."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkern.optim.lora.layout import layout_of, mesh_of
from effkern.optim.lora.pairs import LoraPair, as_pairs, check_distinct, other_trainable


class Rule(NamedTuple):
    """A number that an option must be."""

    holds: Callable[[float], bool]
    words: str


POSITIVE = Rule(lambda x: x > 0, "be positive and finite")
AT_LEAST_0 = Rule(lambda x: x >= 0, "be at least 0 and finite")
SHARE = Rule(lambda x: 0 < x < 1, "be in (0, 1)")
BETA = Rule(lambda x: 0 <= x < 1, "be in [0, 1)")


class LoraOptimizer(torch.optim.Optimizer):
    """torch.optim.Optimizer whose parameters are the factors of LoRA pairs.

    A group's `params` are A_0, B_0, A_1, B_1 ...; its `names` and `rank_dims` say what they are, so that a state_dict
    is made of tensors, numbers, strings and lists alone.
    """

    rules: Mapping[str, Rule] = {}
    """Options that are numbers."""
    flags: tuple[str, ...] = ()
    """Options that are True or False."""
    small_state: tuple[str, ...] = ()
    """Entries of a parameter's state that are views of stacked tensors."""
    large_state: tuple[str, ...] = ()
    """Entries of the parameter's shape that every state has."""
    _kept: tuple[str, ...] = ("_others", "_skipped")
    """Attributes that a copy has too."""
    _other_states = ""
    """Ends the message about another optimizer's state."""

    # torch.amp.GradScaler then leaves scale and found_inf to step(), without a host read.
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any], others: str) -> None:
        if others not in ("error", "ignore"):
            raise ValueError(f"{self._me}: others must be 'error' or 'ignore', got {others!r}")
        self._others = others
        self._skipped: Tensor | None = None
        self._forget()
        if not isinstance(params, (nn.Module, Tensor)):
            params = list(params)
        if not _is_groups(params):
            params = [{"params": params}]
        super().__init__(params, defaults)

    @property
    def _me(self) -> str:
        return type(self).__name__

    @property
    def skipped(self) -> Tensor:
        """Number of steps that changed nothing because something was not finite: 0-d int64, on the parameters' device.

        Reading it as a number waits for the device. It counts from the construction on, and is no part of state_dict.
        """
        if self._skipped is None:
            device = self.param_groups[0]["params"][0].device
            self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped

    def _forget(self) -> None:
        """Drop everything that can be made again from `state`."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: `params` is what the constructor takes, and any option may stand beside it.

        Raises:
            ValueError, TypeError: no pairs, an odd or ambiguous list, a factor in two pairs, an option out of range, or
                trainable parameters of a model that belong to no pair (others="error").
        """
        group = dict(param_group)
        if "params" not in group:
            raise ValueError(f"{self._me}: a group must have params, got {sorted(group)}")
        what = group["params"]
        number = len(self.param_groups)
        pairs = as_pairs(what, f"param_groups[{number}]" if number else "params")
        if isinstance(what, nn.Module) and self._others == "error":
            left = [name for name, _ in other_trainable(what, pairs)]
            if left:
                raise ValueError(
                    f"{self._me}: params must hold LoRA pairs alone, got other trainable parameters: {_some(left)}. "
                    "Freeze them or give them to an optimizer of their own, with others='ignore' here"
                )
        check_distinct([*(pair for old in self.param_groups for pair in self.pairs(old)), *pairs])
        for pair in pairs:
            for label, factor, dim in (("A", pair.A, pair.rank_dim_A), ("B", pair.B, pair.rank_dim_B)):
                if mesh_of(factor) is None:
                    layout_of(f"{label} of {pair.name}", factor, dim)
        group["params"] = [factor for pair in pairs for factor in (pair.A, pair.B)]
        group["names"] = [pair.name for pair in pairs]
        group["rank_dims"] = [dim for pair in pairs for dim in (pair.rank_dim_A, pair.rank_dim_B)]
        unknown = [key for key in group if key not in self.defaults and key not in _FIXED]
        if unknown:
            raise ValueError(f"{self._me}: a group must have options of {sorted(self.defaults)}, got {unknown}")
        for name, default in self.defaults.items():
            group.setdefault(name, default)
        self._check(group)
        super().add_param_group(group)
        self._forget()

    def _check(self, group: Mapping[str, Any]) -> None:
        for name, rule in self.rules.items():
            values = group[name] if isinstance(group[name], (tuple, list)) else (group[name],)
            if name == "betas" and len(values) != 2:
                raise ValueError(f"{self._me}: betas must be two numbers, got {group[name]!r}")
            for value in values:
                if isinstance(value, Tensor):
                    if name != "lr" or value.numel() != 1:
                        raise ValueError(f"{self._me}: {name} must be a number, got a tensor {list(value.shape)}")
                    if not (math.isfinite(float(value)) and rule.holds(float(value))):
                        raise ValueError(f"{self._me}: {name} must {rule.words}, got {value}")
                elif isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise TypeError(f"{self._me}: {name} must be a number, got {value!r}")
                elif not (math.isfinite(value) and rule.holds(value)):
                    raise ValueError(f"{self._me}: {name} must {rule.words}, got {value}")
        for name in self.flags:
            if not isinstance(group[name], bool):
                raise TypeError(f"{self._me}: {name} must be True or False, got {group[name]!r}")

    @staticmethod
    def pairs(group: Mapping[str, Any]) -> list[LoraPair]:
        """The pairs of one of param_groups."""
        params, dims = group["params"], group["rank_dims"]
        return [LoraPair(name, params[2 * i], params[2 * i + 1], dims[2 * i], dims[2 * i + 1])
                for i, name in enumerate(group["names"])]  # fmt: skip

    def active(self, group: Mapping[str, Any]) -> Iterator[LoraPair]:
        """Pairs of a group that take part in a step: those where no factor with requires_grad lacks its gradient.

        Raises:
            NotImplementedError: a sparse gradient.
        """
        for pair in self.pairs(group):
            trained = [factor for factor in (pair.A, pair.B) if factor.requires_grad]
            grads = [factor.grad for factor in trained if factor.grad is not None]
            if not trained or len(grads) < len(trained):
                continue
            if any(grad.layout != torch.strided for grad in grads):
                raise NotImplementedError(f"{self._me}: {pair.name} must have dense gradients, got a sparse one")
            yield pair

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with every tensor of its own memory: it loads with weights_only and resumes bit for bit."""
        packed = super().state_dict()
        packed["state"] = {
            index: {k: v.clone() if k in self.small_state else v for k, v in entry.items()}
            for index, entry in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, but every tensor keeps the precision it was saved in.

        Raises:
            ValueError: the state of another optimizer, or the stored pairs have other names, ranks or shapes than
                these; nothing was changed.
        """
        groups = state_dict["param_groups"]
        for i, (own, stored) in enumerate(zip(self.param_groups, groups)):
            missing = [key for key in ("names", "rank_dims") if key not in stored]
            if missing:
                raise ValueError(
                    f"{self._me}: stored param_groups[{i}] must be of a {self._me}, got none of {missing}"
                    + self._other_states
                )
            for key in ("names", "rank_dims"):
                if stored[key] != own[key]:
                    raise ValueError(
                        f"{self._me}: stored param_groups[{i}] must have the pairs of this optimizer, got "
                        f"{key} {_some(stored[key])} for {_some(own[key])}"
                    )
        order = [index for group in groups for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        if len(order) == len(params):
            self._check_state([state_dict["state"].get(index, {}) for index in order])
        super().load_state_dict(dict(state_dict))
        for index, param in zip(order, params):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    # torch casts to the parameter's dtype, which loses the float64 part.
                    self.state[param][key] = value.detach().to(param.device, copy=True)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        self._forget()

    def _check_state(self, entries: list[Mapping[str, Any]]) -> None:
        """Raises ValueError where stored state, an entry for each of all parameters, does not fit them."""
        params = (p for group in self.param_groups for p in group["params"])
        names = (f"{x} of {pair.name}" for group in self.param_groups for pair in self.pairs(group) for x in "AB")
        for name, param, entry in zip(names, params, entries):
            missing = [key for key in (*self.large_state, *self.small_state) if key not in entry]
            if entry and missing:
                raise ValueError(f"state of {name}: must be of a {self._me}, got none of {missing}{self._other_states}")
            for key in (*self.large_state, "master"):
                if key in entry and entry[key].shape != param.shape:
                    raise ValueError(
                        f"state of {name}: {key} must have shape {list(param.shape)}, got {list(entry[key].shape)}"
                    )

    def __getstate__(self) -> dict[str, Any]:
        # torch's keeps defaults, state and param_groups alone.
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch puts it there, for optimizers that have such an option.
        self.defaults.pop("differentiable", None)
        self._forget()


_FIXED = ("params", "names", "rank_dims", "param_names", "initial_lr")


def _is_groups(params: Any) -> bool:
    return isinstance(params, (list, tuple)) and bool(params) and all(isinstance(item, dict) for item in params)


def _some(names: list[Any], most: int = 6) -> str:
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
