"""What all optimizers of LoRA pairs share: groups of pairs, checks, which pairs take part in a step, exact state."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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

    # torch.amp.GradScaler then leaves scale and found_inf to step(), without a host read.
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any], others: str) -> None:
        if others not in ("error", "ignore"):
            raise ValueError(f"{self._me}: others must be 'error' or 'ignore', got {others!r}")
        self._others = others
        self._forget()
        if not isinstance(params, (nn.Module, Tensor)):
            params = list(params)
        if not _is_groups(params):
            params = [{"params": params}]
        super().__init__(params, defaults)

    @property
    def _me(self) -> str:
        return type(self).__name__

    def _forget(self) -> None:
        """Drop everything that can be made again from `state`."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: `params` is what the constructor takes, and any option may stand beside it.

        Raises:
            ValueError, TypeError: no pairs, an odd or ambiguous list, a factor in two pairs, an option out of range, or
                trainable parameters of a model that belong to no pair (others="error").
        """
        group = dict(param_group)
        what = group["params"]
        pairs = as_pairs(what)
        if isinstance(what, nn.Module) and self._others == "error":
            left = [name for name, _ in other_trainable(what, pairs)]
            if left:
                raise ValueError(
                    f"{self._me}: params must hold LoRA pairs alone, got other trainable parameters: {_some(left)}. "
                    "Freeze them or give them to an optimizer of their own, with others='ignore' here"
                )
        check_distinct([*(pair for old in self.param_groups for pair in self.pairs(old)), *pairs])
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
            ValueError: the stored pairs have other names or ranks than these.
        """
        groups = state_dict["param_groups"]
        for i, (own, stored) in enumerate(zip(self.param_groups, groups)):
            for key in ("names", "rank_dims"):
                if key in stored and stored[key] != own[key]:
                    raise ValueError(
                        f"{self._me}: stored param_groups[{i}] must have the pairs of this optimizer, got "
                        f"{key} {_some(stored[key])} for {_some(own[key])}"
                    )
        super().load_state_dict(dict(state_dict))
        order = [index for group in groups for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, param in zip(order, params):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    # torch casts to the parameter's dtype, which loses the float64 part.
                    self.state[param][key] = value.detach().to(param.device, copy=True)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_others", "ignore")
        self._forget()


_FIXED = ("params", "names", "rank_dims", "param_names", "initial_lr")


def _is_groups(params: Any) -> bool:
    return isinstance(params, (list, tuple)) and bool(params) and all(isinstance(item, dict) for item in params)


def _some(names: list[Any], most: int = 6) -> str:
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def scaled_grads(
    grads: list[Tensor], inverse_scale: Tensor | None, found_inf: Tensor | None, sign: float
) -> list[Tensor]:
    """Gradients without the scale of a GradScaler, all NaN where found_inf says so: such a step changes nothing."""
    if inverse_scale is None and found_inf is None:
        return grads if sign > 0 else list(torch._foreach_neg(grads))
    factor = torch.ones((), device=grads[0].device) if inverse_scale is None else inverse_scale
    factor = factor.to(grads[0].device) * sign
    if found_inf is not None:
        factor = torch.where(found_inf.to(factor.device).reshape(()) != 0, torch.nan, factor)
    # A float16 gradient without its scale may be below the smallest float16 number.
    wide = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    return [grad * factor.to(grad.dtype) for grad in wide]
