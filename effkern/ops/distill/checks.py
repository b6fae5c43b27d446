"""Argument checks of `linear_distill_loss`: every message names the argument, the rule and what came.

Shapes, dtypes, devices and Python numbers are checked here, before anything is computed. Values inside tensors
(labels, omega) are checked by the op itself.
"""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from effkern.ops import autocast
from effkern.ops.distill.rows import DIVERGENCES
from effkern.ops.distill.types import TeacherConfidence, TeacherTopK

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
    return autocast.autocasts(device.type)


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


def check_options(
    divergence: Any = "forward_kl", alpha: Any = None, beta: Any = None, normalize_jsd: Any = False,
    t_squared: Any = False, temperature: Any = None, teacher_temperature: Any = None, ignore_index: Any = -100,
    label_smoothing: Any = 0.0, z_loss: Any = 0.0, softcap: Any = None, logit_scale: Any = 1.0,
    reduction: Any = "mean", chunk_bytes: Any = None,
) -> None:  # fmt: skip
    """The numbers and names that need no tensor to be judged."""
    if divergence not in DIVERGENCES:
        fail(ValueError, "divergence", f"be one of {', '.join(map(repr, DIVERGENCES))}", repr(divergence))
    _check_parameters(divergence, {"alpha": alpha, "beta": beta}, normalize_jsd)
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if value is None:
            continue
        positive(name, value)
        if not DIVERGENCES[divergence].tempered and value != 1:
            fail(ValueError, name, f"be 1 with {divergence!r}, which is taken on the logits themselves", value)
    for name, value in (("normalize_jsd", normalize_jsd), ("t_squared", t_squared)):
        if not isinstance(value, bool):
            fail(TypeError, name, "be a bool", type(value).__name__)
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


def _check_parameters(divergence: str, given: dict[str, Any], normalize_jsd: Any) -> None:
    """alpha and beta: there where the divergence has them, nowhere else, and within their range."""
    for name, value in given.items():
        if name not in DIVERGENCES[divergence].parameters:
            if value is not None:
                fail(ValueError, name, f"be None with divergence {divergence!r}", value)
            continue
        if value is None:
            fail(ValueError, name, f"be given with divergence {divergence!r} (there is no default that fits all)", None)
        number(name, value, low=0, high=math.inf if divergence == "decoupled_kl" else 1)
    if divergence.startswith("skew") and given["alpha"] == 1:
        fail(ValueError, "alpha", "be below 1 (at 1 the divergence is zero)", given["alpha"])
    if divergence == "jsd" and not normalize_jsd and given["beta"] in (0, 1):
        rule = "lie between 0 and 1, where the divergence is not zero (its limits: normalize_jsd=True)"
        fail(ValueError, "beta", rule, given["beta"])
    if normalize_jsd and divergence != "jsd":
        fail(ValueError, "normalize_jsd", "be False unless divergence is 'jsd'", repr(divergence))


def check_mixture(
    teacher: Any, divergence: str, omega: Any, temperature: Any, teacher_temperature: Any, reduction: str, denom: Any,
    hidden: Tensor,
) -> None:  # fmt: skip
    """What goes with a teacher, and the denominator."""
    needed = {"omega": omega}
    if DIVERGENCES[divergence].tempered:
        needed["temperature"] = temperature
        # The masses of a sparse teacher are those that it was cut at.
        if not isinstance(teacher, (TeacherTopK, TeacherConfidence)):
            needed["teacher_temperature"] = teacher_temperature
    for name, value in needed.items():
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


def check_extras(
    weight: Tensor, num_kept: Any, weight_grad: Any, reduction: str, chunk_bytes: Any = None, memory_limit: Any = None
) -> None:
    """The arguments that only make it faster."""
    if num_kept is not None:
        whole("num_kept", num_kept, 0, 2**62)
    if memory_limit is not None:
        whole("memory_limit", memory_limit, 1, 2**62)
        if chunk_bytes is not None:
            fail(ValueError, "chunk_bytes", "be None with memory_limit, which decides on the chunks", chunk_bytes)
    if weight_grad is None:
        return
    acc = torch.promote_types(weight.dtype, torch.float32)
    tensor("weight_grad", weight_grad, tuple(weight.shape), weight.device, (acc,))
    if not weight_grad.is_contiguous() or weight_grad.requires_grad:
        fail(ValueError, "weight_grad", "be contiguous and need no gradient itself", f"strides {weight_grad.stride()}")
    if reduction == "none":
        fail(ValueError, "weight_grad", "be None with reduction='none', whose row factors come later", "a tensor")
