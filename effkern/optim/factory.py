"""Optimizers by name over a whole model, with the groups that each wants."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effkern.optim.grouping import parameter_groups
from effkern.optim.lora import LoRAMuon, LoRARite, ScaledAdam
from effkern.optim.shampoo import OneSidedShampoo, Shampoo
from effkern.optim.together import Together

Groups = list[dict[str, Any]]
_LORA: dict[str, type[torch.optim.Optimizer]] = {
    "lora_rite": LoRARite, "lora_muon": LoRAMuon, "scaled_adam": ScaledAdam,
}  # fmt: skip
_SHAMPOO: dict[str, type[torch.optim.Optimizer]] = {"shampoo": Shampoo, "one_sided_shampoo": OneSidedShampoo}
NAMES = ("adamw", *_SHAMPOO, "muon", *_LORA)


def create(
    name: str,
    model: nn.Module,
    lr: float | Tensor | None = None,
    *,
    weight_decay: float = 0.0,
    matrix_lr_ratio: float = 1.0,
    output: Iterable[str] = (),
    adamw: Mapping[str, Any] | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer of all trainable parameters of `model`, each stepped by what suits its role (`roles`).

    | name | matrices | LoRA factors | output layer, embeddings, norms, vectors |
    | --- | --- | --- | --- |
    | adamw | torch's AdamW | AdamW | AdamW |
    | shampoo, one_sided_shampoo | Shampoo | AdamW, in the same optimizer | AdamW, in the same optimizer |
    | muon | torch's Muon; of more than two dimensions AdamW | AdamW | AdamW |
    | lora_rite, lora_muon, scaled_adam | AdamW | the named one | AdamW |

    Where two optimizers take part they are one `Together`. `describe` prints who steps what.

    Args:
        lr: of all groups; None: the default of the named optimizer's class.
        weight_decay: decoupled; of matrices, output layer and LoRA factors.
        matrix_lr_ratio: for shampoo and muon: the rate of the matrices over that of the others. Schedulers that set
            rates instead of scaling them (OneCycleLR, CyclicLR) keep it if given one rate per group.
        output: ends of names of output layers, beside those that are found.
        adamw: options of the AdamW beside muon and the LoRA optimizers (lr, betas, eps ..).
        options: of the named optimizer's class. Muon's adjust_lr_fn is "match_rms_adamw" unless said otherwise, so that
            AdamW's rate fits both; AdamW's fused is True where the parameters allow it.

    Returns:
        A torch.optim.Optimizer: schedulers, GradScaler, accelerate and trainers take it as any other. Its groups have
        the entry `role` (but LoRA optimizers', which have none), those of matrices `lr_ratio`.

    Raises:
        ValueError: an unknown name, a number out of range, no parameter to train, no LoRA pairs for a LoRA optimizer.
        TypeError: an option that the class does not have.
    """
    op = f"create({name!r})"
    if name not in NAMES:
        raise ValueError(f"create: name must be one of {', '.join(NAMES)}, got {name!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    _check(op, "weight_decay", weight_decay, lambda x: x >= 0, "at least 0")
    _check(op, "matrix_lr_ratio", matrix_lr_ratio, lambda x: x > 0, "above 0")
    if matrix_lr_ratio != 1.0 and name not in (*_SHAMPOO, "muon"):
        raise ValueError(
            f"{op}: matrix_lr_ratio must be left at 1, as no group is stepped apart, got {matrix_lr_ratio}"
        )
    if adamw is not None and name in ("adamw", *_SHAMPOO):
        raise ValueError(f"{op}: adamw must be None, as there is no other optimizer, got {dict(adamw)!r}")
    groups = parameter_groups(model, weight_decay=weight_decay, output=output)
    if name == "adamw":
        return _adamw(op, groups, lr, options)
    if name in _SHAMPOO:
        return _shampoo(op, _SHAMPOO[name], groups, lr, matrix_lr_ratio, options)
    if name == "muon":
        return _muon(op, groups, lr, matrix_lr_ratio, dict(adamw or {}), options)
    return _lora(op, _LORA[name], groups, model, lr, dict(adamw or {}), options, weight_decay)


def _check(op: str, name: str, value: Any, holds: Callable[[float], bool], rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
        raise ValueError(f"{op}: {name} must be {rule}, got {value!r}")


# Arguments that create has under names of its own, or decides on.
_OWN = ("params", "lr", "weight_decay", "options", "others", "rule")


def _check_names(op: str, kind: Any, options: Mapping[str, Any]) -> None:
    """Raises TypeError for an option that `kind` does not have."""
    known = set(inspect.signature(kind).parameters) - set(_OWN)
    if kind is OneSidedShampoo:
        known |= set(inspect.signature(Shampoo).parameters) - {*_OWN, "exponents"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"{op}: options must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")


def _make(op: str, kind: Any, groups: Any, lr: Any, options: Mapping[str, Any], **decided: Any) -> Any:
    """`kind` over `groups`.

    Raises:
        TypeError: an option that it does not have.
    """
    _check_names(op, kind, options)
    return kind(groups, **({} if lr is None else {"lr": lr}), **options, **decided)


def _adamw(op: str, groups: Groups, lr: Any, options: Mapping[str, Any]) -> Any:
    params = [p for group in groups for _, p in group["params"]]
    # As torch's own fused AdamW has it; a choice between its forms is left to whoever makes one.
    fits = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
    chosen = {} if {"fused", "foreach", "differentiable"} & set(options) else {"fused": fits}
    return _make(op, torch.optim.AdamW, groups, lr, {**chosen, **options})


def _scaled(groups: Groups, kind: Any, lr: Any, ratio: float) -> None:
    rate = inspect.signature(kind).parameters["lr"].default if lr is None else lr
    for group in groups:
        group["lr_ratio"] = ratio
        if ratio != 1.0:
            group["lr"] = rate * ratio


def _shampoo(op: str, kind: Any, groups: Groups, lr: Any, ratio: float, options: Mapping[str, Any]) -> Any:
    for group in groups:
        group["rule"] = "shampoo" if group["role"] == "matrices" else "adamw"
    _scaled([group for group in groups if group["role"] == "matrices"], kind, lr, ratio)
    return _make(op, kind, groups, lr, options)


def _muon(op: str, groups: Groups, lr: Any, ratio: float, adamw: dict[str, Any], options: Mapping[str, Any]) -> Any:
    matrices, rest = [], []
    for group in groups:
        flat = [(name, p) for name, p in group["params"] if p.dim() == 2 and group["role"] == "matrices"]
        other = [pair for pair in group["params"] if group["role"] != "matrices" or pair[1].dim() != 2]
        matrices += [{**group, "params": flat}] if flat else []
        rest += [{**group, "params": other}] if other else []
    if not matrices:
        raise ValueError(f"{op}: model must have matrices besides embeddings and output layer, got none")
    _scaled(matrices, torch.optim.Muon, lr, ratio)
    muon = _make(op, torch.optim.Muon, matrices, lr, {"adjust_lr_fn": "match_rms_adamw", **options})
    return _beside(op, muon, rest, lr, adamw)


def _lora(
    op: str, kind: Any, groups: Groups, model: nn.Module, lr: Any, adamw: dict[str, Any], options: Mapping[str, Any],
    weight_decay: float,
) -> Any:  # fmt: skip
    # The class says what a model without pairs lacks.
    pairs = _make(op, kind, model, lr, options, others="ignore", weight_decay=weight_decay)
    rest = [group for group in groups if group["role"] != "lora"]
    return _beside(op, pairs, rest, lr, adamw)


def _beside(op: str, first: Any, rest: Groups, lr: Any, adamw: dict[str, Any]) -> Any:
    """`first` and an AdamW of the other groups, if there are any."""
    rate = adamw.pop("lr", lr)
    _check_names(f"{op}, adamw", torch.optim.AdamW, adamw)
    if not rest:
        return first
    return Together(first, _adamw(f"{op}, adamw", rest, rate, adamw))
