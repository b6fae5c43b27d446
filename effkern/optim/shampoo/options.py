"""What may be chosen per parameter group, and the rules that the choices obey."""

import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.shampoo.methods import covers

SIDES = ("auto", "left", "right", "both")
ACCUMULATIONS = ("ema", "sum", "weighted", "kl")
GRAFTS = ("none", "rms", "sgd", "adagrad", "rmsprop", "adam")
RULES = ("auto", "shampoo", "adamw")
ROOT_METHODS = ("auto", "rational", "eigh", "polar_express", "gram_ns", "coupled_newton")

Frequency = int | Sequence[tuple[int, int]]


def _require(name: str, holds: bool, rule: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"Shampoo: {name} must {rule}, got {value!r}")


def is_number(value: Any) -> bool:
    """Of Python's or NumPy's kinds of real numbers."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def as_floats(group: dict[str, Any]) -> dict[str, Any]:
    """The group with NumPy's numbers as Python's, which the ops ask for."""

    def one(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(one, value))
        return float(value) if is_number(value) and not isinstance(value, (int, float)) else value

    return {key: value if key == "params" else one(value) for key, value in group.items()}


def is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def frequency_at(frequency: Frequency, step: int) -> int:
    """Steps between two roots at step `step` (from 1): the number itself, or that of the last pair begun."""
    if isinstance(frequency, int):
        return frequency
    return next(every for first, every in reversed(list(frequency)) if first <= step)


def root_is_due(frequency: Frequency, start: int, step: int) -> bool:
    """Whether a root is taken at step `step`: at `start`, and at multiples of the frequency after it."""
    return step == start or (step > start and step % frequency_at(frequency, step) == 0)


def last_root_step(frequency: Frequency, start: int, step: int) -> int:
    """The last step up to `step` at which a root was due; 0 if there was none."""
    if step < start:
        return 0
    for first, every in [(1, frequency)] if isinstance(frequency, int) else list(reversed(list(frequency))):
        multiple = step - step % every
        if multiple >= max(first, start):
            return multiple
        step = min(step, first - 1)
    return start


def sides_of(side: str, rows: int, cols: int) -> tuple[bool, bool]:
    """Whether a matrix is preconditioned from the left and from the right; "auto" is its smaller side."""
    if side == "auto":
        side = "left" if rows <= cols else "right"
    return side in ("left", "both"), side in ("right", "both")


def exponents_of(group: dict[str, Any], left: bool, right: bool) -> tuple[float, float]:
    """(a, b) of L^-a M R^-b; 0 on a side that is not preconditioned. By default they sum to 1/2, or 1 with "kl"."""
    given = group["exponents"]
    if given is None:
        each = 0.5 if not (left and right) or group["accumulation"] == "kl" else 0.25
        given = (each, each)
    elif not isinstance(given, (tuple, list)):
        given = (given, given)
    return (float(given[0]) if left else 0.0, float(given[1]) if right else 0.0)


def _check_frequency(value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        _require("precondition_frequency", value >= 1, "be at least 1", value)
        return
    rule = "be a whole number or pairs (first step, frequency) with rising first steps from 1 and frequencies >= 1"
    pairs = list(value) if isinstance(value, (list, tuple)) else []
    good = bool(pairs) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(is_whole(x, 1) for x in pair) for pair in pairs
    )
    firsts = [pair[0] for pair in pairs] if good else []
    _require("precondition_frequency", good and firsts[0] == 1 and firsts == sorted(set(firsts)), rule, value)


def _check_exponents(group: dict[str, Any], warn: bool) -> None:
    given, side = group["exponents"], group["side"]
    if given is None:
        return
    both = given if isinstance(given, (tuple, list)) else (given, given)
    rule = "be None, a positive number, or a pair (left, right) of them"
    good = len(both) == 2 and all(is_number(x) and 0 < x <= 2 for x in both)
    _require("exponents", good, rule + " of at most 2", given)
    total = sum(both) if side == "both" else both[0 if side != "right" else 1]
    usual = 1.0 if group["accumulation"] == "kl" else 0.5
    if side == "auto" and both[0] != both[1]:
        raise ValueError(f"Shampoo: exponents must be one number where side='auto', got {given!r}")
    if warn and abs(total - usual) > 1e-12:
        warnings.warn(
            f"Shampoo: exponents sum to {total:g}, not {usual:g}: the update's size then depends on the gradient's; "
            f'grafting="{group["grafting"]}"' + (" sets it" if group["grafting"] != "none" else " does not set it"),
            stacklevel=6,
        )


def check_group(group: dict[str, Any], *, warn: bool = True) -> None:
    """Raises ValueError naming the option that breaks its rule; warns of exponents with an unusual sum."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        _require("lr", lr.numel() == 1, "have one element where it is a tensor", tuple(lr.shape))
        _require("lr", lr.is_floating_point(), "be floating where it is a tensor", lr.dtype)
    for name in ("lr",) * (not isinstance(lr, Tensor)) + ("weight_decay", "ridge", "eps"):
        value = group[name]
        # Written so that NaN fails.
        _require(name, is_number(value) and value >= 0, "be at least 0", value)
        _require(name, value < float("inf"), "be finite", value)
    for name in ("betas", "adamw_betas"):
        betas = group[name]
        good = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)
        _require(name, good, "be two numbers in [0, 1)", betas)
    for name, known in (
        ("side", SIDES), ("accumulation", ACCUMULATIONS), ("grafting", GRAFTS), ("rule", RULES),
        ("root_method", ROOT_METHODS),
    ):  # fmt: skip
        _require(name, group[name] in known, f"be one of {known}", group[name])
    scale = group["graft_scale"]
    _require("graft_scale", is_number(scale) and 0 < scale < float("inf"), "be positive and finite", scale)
    tolerance = group["pseudo_inverse"]
    good = tolerance is None or (is_number(tolerance) and 0 < tolerance < 1)
    _require("pseudo_inverse", good, "be None or a share of the largest eigenvalue in (0, 1)", tolerance)
    for name in ("block_size", "start_step", "max_failures", "check_every"):
        _require(name, is_whole(group[name], 1), "be a whole number of at least 1", group[name])
    _require(
        "bias_correction", isinstance(group["bias_correction"], bool), "be True or False", group["bias_correction"]
    )
    kl = group["accumulation"] == "kl"
    _require("side", not kl or group["side"] == "both", 'be "both" with accumulation="kl"', group["side"])
    _check_frequency(group["precondition_frequency"])
    _check_exponents(group, warn)
    _check_method(group)


def _check_method(group: dict[str, Any]) -> None:
    """That the chosen method has the roots that are asked for."""
    method, side = group["root_method"], group["side"]
    if method == "auto":
        return
    for exponent in exponents_of(group, side != "right", side in ("right", "both")):
        if exponent:
            rule = covers(method, -exponent, group["ridge"], group["pseudo_inverse"])
            _require("root_method", rule is None, f"suit the other options: {method!r} needs {rule}", method)


def check_impl(impl: Any) -> None:
    """Raises ValueError for what no op knows; whether it runs on a parameter's device shows at the first step."""
    known = ("auto", *(i.name for i in registry.registered()["shampoo_apply_"]))
    _require("impl", impl in known, f"be one of {known}", impl)


def check_parameter(parameter: Tensor, name: str) -> None:
    """Raises TypeError for what no rule here can step."""
    if parameter.is_complex():
        raise TypeError(f"Shampoo: {name} must be real, got {parameter.dtype}")
    if parameter.layout != torch.strided:
        raise TypeError(f"Shampoo: {name} must be dense, got layout {parameter.layout}")
    if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"Shampoo: {name} must be float64, float32, bfloat16 or float16, got {parameter.dtype}")
