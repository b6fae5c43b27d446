"""Inputs of the distillation loss that its tests share, and its three runs: truth, eager, ours."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from effkern import TeacherHidden, TeacherLogits, linear_distill_loss
from effkern.ops import registry
from effkern.ops.distill import reference
from effkern.ops.distill.rows import RowOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def implementations() -> list:
    """Every implementation, with the reason where this machine cannot run it."""
    params = []
    for i in registry.registered()["linear_distill_loss"]:
        reason = i.unavailable(torch.device(DEVICE))
        params.append(pytest.param(i.name, marks=pytest.mark.skip(reason=reason) if reason else ()))
    return params


@dataclass
class Case:
    """Tensors and options of one call."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher: Tensor | None = None
    bias: Tensor | None = None
    weights: Tensor | None = None
    omega: float | Tensor = 0.0
    vocab_valid: int | None = None
    reduction: str = "mean"
    denom: float | None = None
    options: RowOptions = field(default_factory=RowOptions)


def make(
    rows: int = 13, dim: int = 24, vocab: int = 50, *, dtype: torch.dtype = torch.float32, teacher: bool = True,
    bias: bool = False, weights: bool = False, omega: float = 0.6, spread: float = 1.0, ignored: int = 2, **options,
) -> Case:  # fmt: skip
    """Random inputs; logits have about the standard deviation `spread`."""
    labels = torch.randint(0, vocab, (rows,))
    labels[1 : 1 + ignored] = options.get("ignore_index", -100)
    case = Case(
        hidden=torch.randn(rows, dim).to(dtype),
        weight=(torch.randn(vocab, dim) * spread / dim**0.5).to(dtype),
        labels=labels,
        teacher=(torch.randn(rows, vocab) * spread).to(dtype) if teacher else None,
        bias=(torch.randn(vocab) * 0.5).to(dtype) if bias else None,
        weights=torch.rand(rows) if weights else None,
        omega=omega if teacher else 0.0,
        options=RowOptions(**options),
    )
    return to(case, device=DEVICE)


def to(case: Case, **kwargs) -> Case:
    """The case with its floating tensors (device: all tensors) converted."""
    moved = {}
    for name, x in vars(case).items():
        if isinstance(x, Tensor):
            only_device = {k: v for k, v in kwargs.items() if k == "device"}
            moved[name] = x.to(**(kwargs if x.is_floating_point() else only_device))
    return replace(case, **moved)


def leaves(case: Case) -> list[Tensor]:
    """Detached copies that require a gradient: hidden, weight, bias."""
    return [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias) if x is not None]


def oracle(case: Case, grad: Tensor | float = 1.0) -> list[Tensor]:
    """[loss, grad_hidden, grad_weight, grad_bias?] of the reference with all logits live, in the case's dtypes."""
    x = leaves(case)
    loss = reference.linear_distill_loss(
        x[0], x[1], case.labels, case.teacher, options=case.options, omega=case.omega, bias=x[2] if x[2:] else None,
        weights=case.weights, vocab_valid=case.vocab_valid, reduction=case.reduction, denom=case.denom,
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad((loss * grad).sum(), x)]


def arguments(case: Case) -> dict:
    """Keywords of the public function, without its tensors that get a gradient."""
    o = case.options._asdict()
    given = case.teacher is not None
    return {
        **o,
        "teacher": TeacherLogits(case.teacher) if case.teacher is not None else None,
        "omega": case.omega if given else None,
        "temperature": o["temperature"] if given else None,
        "teacher_temperature": o["teacher_temperature"] if given else None,
        "weights": case.weights,
        "vocab_valid": case.vocab_valid,
        "reduction": case.reduction,
        "denom": case.denom,
    }


def ours(case: Case, impl: str, grad: Tensor | float = 1.0, **overrides) -> list[Tensor]:
    """The same list from the public function."""
    x = leaves(case)
    keywords = {**arguments(case), **overrides}
    loss = linear_distill_loss(x[0], x[1], case.labels, bias=x[2] if x[2:] else None, impl=impl, **keywords).loss
    return [loss.detach(), *torch.autograd.grad((loss * grad).sum(), x)]


__all__ = ["DEVICE", "Case", "TeacherHidden", "TeacherLogits", "arguments", "implementations", "leaves", "make",
           "oracle", "ours", "to"]  # fmt: skip
