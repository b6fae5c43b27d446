"""Argument checks of `linear_distill_loss`: every message names the argument, the rule and what came.

Shapes, dtypes, devices and Python numbers are checked here, before anything is computed. Values inside tensors
(labels, omega) are checked by the op itself.
"""

import math
from typing import Any

import torch
from torch import Tensor

from effkern.ops.distill.rows import DIVERGENCES
from effkern.ops.distill.types import TeacherHidden, TeacherLogits

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fail(error: type[Exception], argument: str, rule: str, got: object) -> None:
    raise error(f"linear_distill_loss: {argument} must {rule}, got {got}")


def tensor(name: str, x: Any, shape: tuple[int | None, ...], device: torch.device, dtypes: tuple = FLOATING) -> None:
    """`x` is a tensor of one of `dtypes` on `device` whose shape matches; None in `shape` is any size."""
    if not isinstance(x, Tensor):
        fail(TypeError, name, "be a tensor", type(x).__name__)
    if x.dim() != len(shape):
        fail(ValueError, name, f"have {len(shape)} dimension(s)", f"shape {tuple(x.shape)}")
    if any(want is not None and have != want for have, want in zip(x.shape, shape)):
        text = ", ".join("*" if n is None else str(n) for n in shape)
        fail(ValueError, name, f"have shape [{text}]", f"{list(x.shape)}")
    if x.dtype not in dtypes:
        fail(TypeError, name, f"have one of the dtypes {', '.join(str(d)[6:] for d in dtypes)}", str(x.dtype)[6:])
    if x.device != device:
        fail(ValueError, name, f"be on {device} like hidden", str(x.device))


def number(name: str, x: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """`x` is a finite Python number in [low, high], or (low, high] with `open_low`."""
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        fail(TypeError, name, "be a number", type(x).__name__)
    # Comparisons alone: nan fails them, and torch.compile can trace them.
    if (x > low if open_low else x >= low) and x <= high and -math.inf < x < math.inf:
        return
    if high < math.inf:
        rule = f"lie in [{low:g}, {high:g}]"
    else:
        rule = "be finite" if low == -math.inf else f"be {'>' if open_low else '>='} {low:g} and finite"
    fail(ValueError, name, rule, x)


def check_tensors(
    hidden: Any, weight: Any, labels: Any, bias: Any, weights: Any, vocab_valid: int | None, ignore_index: Any
) -> int:
    """Student side; returns the number of vocabulary entries that count."""
    if not isinstance(hidden, Tensor):
        fail(TypeError, "hidden", "be a tensor", type(hidden).__name__)
    device = hidden.device
    tensor("hidden", hidden, (None, None), device)
    tensor("weight", weight, (None, hidden.shape[1]), device)
    if hidden.shape[1] == 0:
        fail(ValueError, "hidden", "have at least one column", f"shape {list(hidden.shape)}")
    if weight.shape[0] == 0:
        fail(ValueError, "weight", "have at least one row", f"shape {list(weight.shape)}")
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(device.type):
        fail(
            TypeError,
            "weight",
            f"have the dtype of hidden ({str(hidden.dtype)[6:]}) outside autocast",
            str(weight.dtype)[6:],
        )
    tensor("labels", labels, (hidden.shape[0],), device, (torch.int64, torch.int32))
    if bias is not None:
        tensor("bias", bias, (weight.shape[0],), device)
    if weights is not None:
        tensor("weights", weights, (hidden.shape[0],), device)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        fail(TypeError, "ignore_index", "be an int", type(ignore_index).__name__)
    if vocab_valid is None:
        return weight.shape[0]
    if isinstance(vocab_valid, bool) or not isinstance(vocab_valid, int):
        fail(TypeError, "vocab_valid", "be an int or None", type(vocab_valid).__name__)
    if not 1 <= vocab_valid <= weight.shape[0]:
        fail(ValueError, "vocab_valid", f"lie in [1, {weight.shape[0]}], the rows of weight", vocab_valid)
    return vocab_valid


def check_teacher(teacher: Any, hidden: Tensor, vocab: int) -> None:
    """Teacher side: sizes, layout, and enough vocabulary."""
    rows, device = hidden.shape[0], hidden.device
    if isinstance(teacher, TeacherLogits):
        name = "teacher.logits"
        tensor(name, teacher.logits, (rows, None), device)
        if rows > 0 and teacher.logits.shape[1] > 1 and teacher.logits.stride(1) != 1:
            fail(ValueError, name, "have stride 1 along the vocabulary", f"strides {list(teacher.logits.stride())}")
        size = teacher.logits.shape[1]
    elif isinstance(teacher, TeacherHidden):
        name = "teacher.weight"
        tensor("teacher.hidden", teacher.hidden, (rows, None), device)
        tensor(name, teacher.weight, (None, teacher.hidden.shape[1]), device)
        if teacher.weight.dtype != teacher.hidden.dtype and not torch.is_autocast_enabled(device.type):
            fail(
                TypeError,
                name,
                f"have the dtype of teacher.hidden ({str(teacher.hidden.dtype)[6:]}) outside autocast",
                str(teacher.weight.dtype)[6:],
            )
        if teacher.bias is not None:
            tensor("teacher.bias", teacher.bias, (teacher.weight.shape[0],), device)
        number("teacher.logit_scale", teacher.logit_scale, low=-math.inf)
        if teacher.softcap is not None:
            number("teacher.softcap", teacher.softcap, low=0, open_low=True)
        size = teacher.weight.shape[0]
    else:
        fail(TypeError, "teacher", "be TeacherLogits, TeacherHidden or None", type(teacher).__name__)
    if size < vocab:
        fail(ValueError, name, f"cover vocab_valid ({vocab}) entries of the vocabulary", size)


def check_numbers(
    teacher: Any, omega: Any, divergence: Any, temperature: Any, teacher_temperature: Any, label_smoothing: Any,
    z_loss: Any, softcap: Any, logit_scale: Any, reduction: Any, denom: Any, hidden: Tensor, chunk_bytes: Any,
) -> None:  # fmt: skip
    """Everything that is no tensor, and omega and denom, which may be."""
    if divergence not in DIVERGENCES:
        fail(ValueError, "divergence", f"be one of {', '.join(map(repr, DIVERGENCES))}", repr(divergence))
    given = {"omega": omega, "temperature": temperature, "teacher_temperature": teacher_temperature}
    for name, value in given.items():
        if teacher is not None and value is None:
            fail(ValueError, name, "be given with a teacher (there is no default that fits all)", None)
    if isinstance(omega, Tensor):
        if omega.dim() > 0:
            tensor("omega", omega, (hidden.shape[0],), hidden.device)
        elif omega.device != hidden.device or omega.dtype not in FLOATING:
            fail(
                ValueError,
                "omega",
                f"be a number or a floating tensor on {hidden.device}",
                f"{omega.dtype} on {omega.device}",
            )
        if teacher is None:
            fail(ValueError, "omega", "be None or 0 without a teacher", "a tensor")
    elif omega is not None:
        number("omega", omega, low=0, high=1)
        if teacher is None and omega != 0:
            fail(ValueError, "omega", "be None or 0 without a teacher", omega)
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if value is not None:
            number(name, value, low=0, open_low=True)
    number("label_smoothing", label_smoothing, low=0, high=1)
    number("z_loss", z_loss, low=0)
    number("logit_scale", logit_scale, low=-math.inf)
    if softcap is not None:
        number("softcap", softcap, low=0, open_low=True)
    if reduction not in ("none", "sum", "mean"):
        fail(ValueError, "reduction", "be 'none', 'sum' or 'mean'", repr(reduction))
    if denom is not None:
        if reduction != "mean":
            fail(ValueError, "denom", f"be None with reduction={reduction!r}", denom)
        if isinstance(denom, Tensor):
            if denom.dim() != 0 or denom.device != hidden.device:
                fail(
                    ValueError,
                    "denom",
                    f"be a number or a 0-d tensor on {hidden.device}",
                    f"shape {list(denom.shape)} on {denom.device}",
                )
        else:
            number("denom", denom, low=0, open_low=True)
    if chunk_bytes is not None:
        number("chunk_bytes", chunk_bytes, low=1)
