"""From the arguments of the public functions to what the operators take."""

from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.distill import checks
from effkern.ops.distill.rows import RowOptions
from effkern.ops.distill.teachers import Source
from effkern.ops.distill.types import (
    Teacher,
    TeacherConfidence,
    TeacherLogits,
    TeacherLogProbs,
    TeacherSimilarity,
    TeacherTopK,
)

OP = "linear_distill_loss"

# Fields of the teacher classes that hold floating-point tensors of kernels.
TEACHER_FLOATS = ("logits", "logprobs", "hidden", "table", "prob")


def compute_dtype_of(x: Tensor) -> torch.dtype:
    """Type of the matrix products: autocast's, as for any linear layer, else that of `x`."""
    if checks.autocasts(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _at_an_end(divergence: str, alpha: float | None, beta: float | None) -> str:
    """The forward or reverse KL that a mixture becomes where one of its terms has no weight.

    A JSD gets here with beta 0 or 1 only if it is normalised: it tends to them.
    """
    ends: dict[tuple[str, float | None], str] = {
        ("jsd", 0): "forward_kl", ("jsd", 1): "reverse_kl", ("symmetric_kl", 1): "forward_kl",
        ("symmetric_kl", 0): "reverse_kl", ("skew_forward_kl", 0): "forward_kl", ("skew_reverse_kl", 0): "reverse_kl",
    }  # fmt: skip
    return ends.get((divergence, alpha if divergence.startswith("skew") else beta), divergence)


class Settings(NamedTuple):
    """What calls of the loss and of its vocabulary-parallel form derive from their arguments alike."""

    source: Source
    options: RowOptions
    weight_N: Tensor
    """w_n, 0 on rows that do not count."""
    omega_N: Tensor
    factor: Tensor
    """1 / denominator."""


def settle(
    teacher: Teacher | None, labels: Tensor, *, divergence: str, alpha: float | None, beta: float | None,
    temperature: float | None, teacher_temperature: float | None, t_squared: bool, normalize_jsd: bool,
    omega: float | Tensor | None, weights: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float | None, logit_scale: float, reduction: str, denom: float | Tensor | None, dtype: torch.dtype,
) -> Settings:  # fmt: skip
    """Tensors per row in `dtype`, the type of the accumulators; arguments are those of `linear_distill_loss`."""
    kept_N = labels != ignore_index
    weight_N = kept_N.to(dtype) if weights is None else torch.where(kept_N, weights.detach().to(dtype), 0.0)
    # Products, where torch.full and expand would do: a traced float stays a variable in them, and the result is packed.
    value = 0.0 if omega is None else omega
    omega_N = torch.ones_like(weight_N) * (value.detach().to(dtype) if isinstance(value, Tensor) else value)
    source, kind, t_teacher = source_of(teacher, labels, divergence, teacher_temperature)
    t_student = float(temperature or 1.0)
    name, scale = _at_an_end(divergence, alpha, beta), 1.0
    if name == "jsd" and normalize_jsd:
        assert beta is not None
        scale = 1.0 / (beta * (1.0 - beta))
    scale *= t_student**2 if t_squared else 1.0
    options = RowOptions(
        name, float(alpha or 0.0), float(beta or 0.0), scale, kind, t_student, t_teacher, float(label_smoothing),
        float(z_loss), None if softcap is None else float(softcap), float(logit_scale), ignore_index,
    )  # fmt: skip
    return Settings(source, options, weight_N, omega_N, mean_factor(reduction, denom, weight_N))


def source_of(
    teacher: Teacher | None, labels: Tensor, divergence: str, temperature: float | None
) -> tuple[Source, str, float]:
    """The teacher as the op takes it, what its rows are (RowOptions.teacher), and T'."""
    t = float(temperature or 1.0)
    if teacher is None:
        return Source("none", ()), "logits", t
    if isinstance(teacher, TeacherLogits):
        return Source("rows", (teacher.logits.detach(),)), "logits", t
    if isinstance(teacher, TeacherLogProbs):
        as_given = t == 1.0 and divergence != "decoupled_kl"
        return Source("rows", (teacher.logprobs.detach(),)), "logprobs" if as_given else "logits", t
    if isinstance(teacher, TeacherTopK):
        return Source("sparse", (teacher.ids, _kept_logprobs(teacher))), teacher.kind, t
    if isinstance(teacher, TeacherConfidence):
        # The label alone is kept, and the rest is spread: KD-pt is the smallest case of KD-topk.
        return (
            Source("sparse", (labels[:, None].clone(), _wide(teacher.prob.detach()).log()[:, None])),
            "uniform_tail",
            1.0,
        )
    if isinstance(teacher, TeacherSimilarity):
        kind = "logits" if divergence == "decoupled_kl" else "logprobs"
        prob = () if teacher.prob is None else (teacher.prob.detach(),)
        # The table is tempered, but not the confidences.
        return Source("table", (teacher.table.detach(), *prob), 1.0 / t), kind, 1.0
    dtype = compute_dtype_of(teacher.hidden)
    bias = () if teacher.bias is None else (teacher.bias.detach(),)
    tensors = (teacher.hidden.detach().to(dtype), teacher.weight.detach().to(dtype), *bias)
    return Source("hidden", tensors, float(teacher.logit_scale), teacher.softcap), "logits", t


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kept_logprobs(teacher: TeacherTopK) -> Tensor:
    logprobs = _wide(teacher.logprobs.detach())
    return logprobs if teacher.lse is None else logprobs - teacher.lse.detach()[:, None].to(logprobs.dtype)


def choose(impl: str, hidden: Tensor, compute_dtype: torch.dtype, teacher: Teacher | None) -> str:
    """The implementation for this device and these dtypes."""
    chosen = registry.choose(OP, impl, hidden.device)
    half = (torch.float32, torch.bfloat16, torch.float16)
    supported = (torch.float32, torch.bfloat16) if chosen == "cpp" else half
    wrong = [compute_dtype] if compute_dtype not in supported else []
    # float16 teachers are widened by every kernel; only float64 is wider than they take.
    parts = () if teacher is None else (getattr(teacher, name) for name in TEACHER_FLOATS if hasattr(teacher, name))
    wrong += [x.dtype for x in parts if x is not None and x.dtype == torch.float64]
    if chosen == "reference" or not wrong:
        return chosen
    if impl == "auto":
        return "reference"
    raise NotImplementedError(f"{OP}: impl={impl!r} does not cover {str(wrong[0])[6:]} tensors")


def mean_factor(reduction: str, denom: float | Tensor | None, weight_N: Tensor) -> Tensor:
    """1 / denominator as a 0-d tensor, 0 where the denominator is 0; 1 unless the reduction is "mean"."""
    if reduction != "mean":
        return weight_N.new_ones(())
    if denom is None:
        count = weight_N.sum()
    else:
        count = weight_N.new_ones(()) * (denom.detach().to(weight_N.dtype) if isinstance(denom, Tensor) else denom)
    return torch.where(count == 0, 0.0, 1.0 / count)
