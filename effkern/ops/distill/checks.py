"""Argument checks of `linear_distill_loss`: every message names the argument, the rule and what came.

Shapes, dtypes, devices and Python numbers are checked here, before anything is computed. Values inside tensors
(labels, omega) are checked by the op itself.
"""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from effkern.ops.distill.rows import DIVERGENCES
from effkern.ops.distill.types import TeacherHidden, TeacherLogits

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# Numbers that are divided by stay within this and its reciprocal: kernels hold both in float32.
SMALLEST = 1e-30


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


def number(name: str, x: Any, *, low: float, high: float = math.inf) -> None:
    """`x` is a finite number in [low, high]."""
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)):
        fail(TypeError, name, "be a number", type(x).__name__)
    # Comparisons alone: nan fails them, and torch.compile can trace them.
    if low <= x <= high and -math.inf < x < math.inf:
        return
    if high < math.inf:
        fail(ValueError, name, f"lie in [{low:g}, {high:g}]", x)
    fail(ValueError, name, "be finite" if low == -math.inf else f"be >= {low:g} and finite", x)


def positive(name: str, x: Any) -> None:
    """`x` is a finite number > 0 whose reciprocal float32 can hold."""
    number(name, x, low=-math.inf)
    if x <= 0:
        fail(ValueError, name, "be > 0 and finite", x)
    if not SMALLEST <= x <= 1 / SMALLEST:
        fail(ValueError, name, f"lie in [{SMALLEST:g}, {1 / SMALLEST:g}]", x)


def whole(name: str, x: Any, low: int, high: int) -> None:
    """`x` is an int in [low, high]."""
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        fail(TypeError, name, "be an int", type(x).__name__)
    if not low <= x <= high:
        fail(ValueError, name, f"lie in [{low}, {high}]", x)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for `device`; some device types (meta) have none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Matrix products need one type; under autocast both are converted."""
    if x.dtype != other.dtype and not autocasts(x.device):
        rule = f"have the dtype of {other_name} ({str(other.dtype)[6:]}) outside autocast"
        fail(TypeError, name, rule, str(x.dtype)[6:])


def check_tensors(hidden: Any, weight: Any, labels: Any, bias: Any, weights: Any, vocab_valid: int | None) -> int:
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
    same_dtype("weight", weight, "hidden", hidden)
    tensor("labels", labels, (hidden.shape[0],), device, (torch.int64, torch.int32))
    if bias is not None:
        tensor("bias", bias, (weight.shape[0],), device)
    if weights is not None:
        tensor("weights", weights, (hidden.shape[0],), device)
    if vocab_valid is None:
        return weight.shape[0]
    whole("vocab_valid", vocab_valid, 1, weight.shape[0])
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
        same_dtype(name, teacher.weight, "teacher.hidden", teacher.hidden)
        if teacher.bias is not None:
            tensor("teacher.bias", teacher.bias, (teacher.weight.shape[0],), device)
        number("teacher.logit_scale", teacher.logit_scale, low=-math.inf)
        if teacher.softcap is not None:
            positive("teacher.softcap", teacher.softcap)
        size = teacher.weight.shape[0]
    else:
        fail(TypeError, "teacher", "be TeacherLogits, TeacherHidden or None", type(teacher).__name__)
    if size < vocab:
        fail(ValueError, name, f"cover vocab_valid ({vocab}) entries of the vocabulary", size)


def check_options(
    divergence: Any = DIVERGENCES[0], temperature: Any = None, teacher_temperature: Any = None,
    ignore_index: Any = -100, label_smoothing: Any = 0.0, z_loss: Any = 0.0, softcap: Any = None,
    logit_scale: Any = 1.0, reduction: Any = "mean", chunk_bytes: Any = None,
) -> None:  # fmt: skip
    """The numbers and names that need no tensor to be judged."""
    if divergence not in DIVERGENCES:
        fail(ValueError, "divergence", f"be one of {', '.join(map(repr, DIVERGENCES))}", repr(divergence))
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if value is not None:
            positive(name, value)
    whole("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    number("label_smoothing", label_smoothing, low=0, high=1)
    number("z_loss", z_loss, low=0)
    number("logit_scale", logit_scale, low=-math.inf)
    if softcap is not None:
        positive("softcap", softcap)
    if reduction not in ("none", "sum", "mean"):
        fail(ValueError, "reduction", "be 'none', 'sum' or 'mean'", repr(reduction))
    if chunk_bytes is not None:
        whole("chunk_bytes", chunk_bytes, 1, 2**62)


def check_mixture(
    teacher: Any, omega: Any, temperature: Any, teacher_temperature: Any, reduction: str, denom: Any, hidden: Tensor
) -> None:
    """What goes with a teacher, and the denominator."""
    given = {"omega": omega, "temperature": temperature, "teacher_temperature": teacher_temperature}
    for name, value in given.items():
        if teacher is not None and value is None:
            fail(ValueError, name, "be given with a teacher (there is no default that fits all)", None)
    device = hidden.device
    if isinstance(omega, Tensor):
        if omega.dim() > 0:
            tensor("omega", omega, (hidden.shape[0],), device)
        elif omega.device != device or omega.dtype not in FLOATING:
            fail(
                ValueError, "omega", f"be a number or a floating tensor on {device}", f"{omega.dtype} on {omega.device}"
            )
        if teacher is None:
            fail(ValueError, "omega", "be None or 0 without a teacher", "a tensor")
    elif omega is not None:
        number("omega", omega, low=0, high=1)
        if teacher is None and omega != 0:
            fail(ValueError, "omega", "be None or 0 without a teacher", omega)
    if denom is None:
        return
    if reduction != "mean":
        fail(ValueError, "denom", f"be None with reduction={reduction!r}", denom)
    if not isinstance(denom, Tensor):
        positive("denom", denom)
    elif denom.dim() != 0 or denom.device != device:
        got = f"shape {list(denom.shape)} on {denom.device}"
        fail(ValueError, "denom", f"be a number or a 0-d tensor on {device}", got)
