"""In place of TRL's GKD loss: the same numbers from logits a chunk of rows at a time, or from hidden states.

TRL itself is imported by whoever trains with it, never here.

N tokens, C rows of a chunk, V vocabulary
"""

import math
from typing import Any

import torch
from torch import Tensor

from effkern.ops.distill import TeacherHidden, TeacherLogits, arguments, checks, chunked, linear_distill_loss
from effkern.ops.distill.rows import RowOptions, Rows
from effkern.ops.distill.types import Teacher

OP = "gkd_loss"
IGNORED = -100
_REDUCTIONS = ("batchmean", "sum", "mean")


def gkd_loss(
    student_logits: Any,
    teacher_logits: Any,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    *,
    num_items_in_batch: Tensor | int | None = None,
    vocab_valid: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Generalized Jensen-Shannon divergence with the signature of TRL's GKDTrainer.generalized_jsd_loss.

    q = softmax(student / T), p = softmax(teacher / T), m = beta p + (1 - beta) q, sum over rows whose label is not -100

        D = beta KL(p, m) + (1 - beta) KL(q, m);  beta = 0: KL(p, q);  beta = 1: KL(q, p)
        batchmean: sum D / number of these rows; without labels sum D / first dimension
        sum: sum D;  mean: sum D / (number of these rows x V)
        num_items_in_batch given: sum D / that, whatever the reduction

    which are TRL's numbers, in float32 sums whatever the inputs are: `GKDTrainer.generalized_jsd_loss =
    staticmethod(gkd_loss)`. (The first TRL releases with GKD mixed log-probabilities; that formula is not covered.)
    Labels are as TRL passes them: those of the rows, already shifted. A beta below half an eps of the sums' dtype
    (2^-24 in float32, where 1 - beta is lost) gives the first order of D, beta KL(p, q), which is no less than D; such
    a 1 - beta gives (1 - beta) KL(q, p).

    Args:
        student_logits: [.., V], float32/bfloat16/float16/float64, or (hidden [.., D], weight [V, D]) or (hidden,
            weight, bias): then no logits exist, and all three get gradients. Get a gradient.
        teacher_logits: the same, or one of effkern's teachers with rows [.., x]. No gradient.
        labels: [..] int64, or None.
        beta: the teacher's share in [0, 1]. temperature: T > 0; no factor T^2.
        reduction: "batchmean", "sum", "mean". Not "none", whose result has V entries a row.
        num_items_in_batch: tokens of all accumulation steps, as Trainer counts them, > 0; a number or 0-d tensor.
        vocab_valid: entries that count, where vocabularies are padded. None: all of the student's.
        impl: as in effkern.linear_distill_loss.

    Returns:
        0-d float32 (float64 for float64). No row that counts: 0, where TRL has nan.

    Raises:
        ValueError, TypeError: a shape, dtype or number that breaks a rule.
        NotImplementedError: reduction="none", or a second derivative.

    Memory: of logits their gradient, in their dtype, and one chunk; of hidden states see linear_distill_loss. A
    gradient is there for one backward.
    Source: Agarwal et al., arXiv 2306.13649.
    """
    if reduction not in _REDUCTIONS:
        kind = NotImplementedError if reduction == "none" else ValueError
        raise kind(f"{OP}: reduction must be one of {_REDUCTIONS}, got {reduction!r}")
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise ValueError(f"{OP}: beta must be in [0, 1], got {beta!r}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"{OP}: temperature must be positive and finite, got {temperature!r}")
    whole = isinstance(student_logits, Tensor)
    first = student_logits if whole else _parts("student_logits", student_logits)[0]
    if not isinstance(first, Tensor) or first.dim() < 2:
        raise ValueError(f"{OP}: student_logits must be [.., V], or hidden states [.., D] with a weight, got {first!r}")
    leading = first.shape[:-1]
    if labels is not None and labels.shape != leading:
        raise ValueError(f"{OP}: labels must have shape {list(leading)}, got {list(labels.shape)}")
    rows = leading.numel()
    vocab = student_logits.shape[-1] if whole else student_logits[1].shape[0]
    vocab = vocab if vocab_valid is None else vocab_valid
    flat = torch.zeros(rows, dtype=torch.long, device=first.device) if labels is None else labels.reshape(-1)
    count: Any = (flat != IGNORED).sum() if labels is not None or reduction == "mean" else leading[0]
    denom = {"batchmean": count, "sum": 1, "mean": count * vocab}[reduction]
    if num_items_in_batch is not None:
        denom = _items(num_items_in_batch)
    divergence, share, size = _divergence(beta, first.dtype)
    teacher = _teacher(teacher_logits, leading)
    if whole:
        if not isinstance(teacher, TeacherLogits):
            got = type(teacher).__name__
            raise TypeError(f"{OP}: teacher_logits must be logits where student_logits are, got {got}")
        loss = _from_logits(student_logits, teacher, flat, divergence, share, temperature, denom, vocab, impl)
        return loss * size
    hidden, weight, bias = _parts("student_logits", student_logits)
    loss = linear_distill_loss(
        hidden.reshape(rows, -1), weight, flat, teacher=teacher, omega=1.0, divergence=divergence, beta=share,
        temperature=temperature, teacher_temperature=temperature, bias=bias, denom=denom,
        vocab_valid=None if vocab == weight.shape[0] else vocab, impl=impl,
    ).loss  # fmt: skip
    return loss * size


def _items(given: Any) -> Any:
    number = isinstance(given, (int, float)) and not isinstance(given, bool) and 0 < given < math.inf
    if not number and not (isinstance(given, Tensor) and given.dim() == 0):
        raise ValueError(f"{OP}: num_items_in_batch must be a positive number or a 0-d tensor, got {given!r}")
    return given


def _divergence(beta: float, dtype: torch.dtype) -> tuple[str, float | None, float]:
    """The divergence with its beta, and a factor: a mixture that rounds to one of its parts is that part."""
    least = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    if beta < least:
        return "forward_kl", None, beta or 1.0
    if 1 - beta < least:
        return "reverse_kl", None, (1 - beta) or 1.0
    return "jsd", beta, 1.0


def _parts(name: str, given: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
        rule = "be a tensor, (hidden, weight) or (hidden, weight, bias)"
        raise TypeError(f"{OP}: {name} must {rule}, got {type(given).__name__}")
    return given[0], given[1], given[2] if len(given) == 3 else None


def _teacher(given: Any, leading: torch.Size) -> Teacher:
    """The teacher with rows in one dimension."""
    if isinstance(given, Tensor):
        given = TeacherLogits(given)
    elif isinstance(given, (tuple, list)):
        given = TeacherHidden(*_parts("teacher_logits", given))
    if isinstance(given, TeacherLogits):
        found = given.logits
    elif isinstance(given, TeacherHidden):
        found = given.hidden
        given = TeacherHidden(
            found.reshape(-1, found.shape[-1]), given.weight, given.bias, given.softcap, given.logit_scale
        )
    else:
        return given
    if found.shape[:-1] != leading:
        want, got = list(leading), list(found.shape[:-1])
        raise ValueError(f"{OP}: teacher_logits must have the leading dimensions {want}, got {got}")
    return given


def _from_logits(
    student: Tensor, teacher: TeacherLogits, labels: Tensor, divergence: str, beta: float | None, temperature: float,
    denom: Any, vocab: int, impl: str,
) -> Tensor:  # fmt: skip
    if student.dtype not in checks.FLOATING:
        raise TypeError(f"{OP}: student_logits must be a floating tensor, got {student.dtype}")
    for name, x in (("student_logits", student), ("teacher_logits", teacher.logits)):
        if x.shape[-1] < vocab or vocab < 1:
            raise ValueError(f"{OP}: {name} must cover vocab_valid={vocab} entries, got {x.shape[-1]}")
        if x.device != student.device:
            raise ValueError(f"{OP}: {name} must be on {student.device}, got {x.device}")
    options = RowOptions(
        divergence, 0.0, beta or 0.0, 1.0, "logits", float(temperature), float(temperature), ignore_index=IGNORED
    )
    wide = torch.promote_types(student.dtype, torch.float32)
    chosen = arguments.choose(impl, student, wide, teacher)
    denominator = torch.as_tensor(denom, dtype=wide, device=student.device)
    factor = torch.where(denominator == 0, 0.0, 1.0 / denominator)
    blocks = _blocks(student, teacher.logits.detach(), labels)
    return _RowLoss.apply(*blocks, factor, options, chosen, vocab)


def _blocks(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, V] twice and [B, N], without a copy where there are three dimensions: TRL cuts prompts from logits."""
    try:
        return tuple(x.view(1, -1, x.shape[-1]) for x in (student, teacher)) + (labels[None],)  # type: ignore[return-value]
    except RuntimeError:
        if student.dim() == 3:
            return student, teacher, labels.view(student.shape[:-1])
        return tuple(x.reshape(1, -1, x.shape[-1]) for x in (student, teacher)) + (labels[None],)  # type: ignore[return-value]


class _RowLoss(torch.autograd.Function):
    """Sum of the rows' divergences times `factor`; its gradient is made in forward, in the dtype of the logits."""

    @staticmethod
    def forward(ctx: Any, student_BNV, teacher_BNV, labels_BN, factor, options, impl, vocab):
        step = max(1, chunked.chunk_bytes(student_BNV.device) // (vocab * factor.element_size()))
        needed = ctx.needs_input_grad[0]
        grad_BNV = torch.zeros_like(student_BNV, memory_format=torch.contiguous_format) if needed else None
        total = factor.new_zeros(())
        for b, student_NV in enumerate(student_BNV):
            for n in range(0, student_NV.shape[0], step):
                part = slice(n, n + step)
                z_CV = student_NV[part, :vocab].to(factor.dtype, copy=True, memory_format=torch.contiguous_format)
                labels_C = labels_BN[b, part].contiguous()
                scale_C = (labels_C != options.ignore_index).to(factor.dtype)
                stats_SC = z_CV.new_zeros(chunked.NUM_STATS, z_CV.shape[0])
                # A teacher with gaps between entries, as a transposed one, would be read wrongly by a kernel.
                teacher_CV = teacher_BNV[b, part, :vocab]
                teacher_CV = teacher_CV if teacher_CV.stride(1) == 1 else teacher_CV.contiguous()
                omega_C = torch.ones_like(scale_C)
                tensors = Rows(z_CV, teacher_CV, None, None, None, labels_C, scale_C, omega_C, stats_SC)
                grad_CV = chunked.row_pass(impl)(tensors, factor.dtype if needed else None, options)
                total += torch.where(scale_C != 0, stats_SC[0], 0.0).sum()
                if grad_BNV is not None and grad_CV is not None:
                    grad_BNV[b, part, :vocab] = grad_CV
        ctx.kept, ctx.factor = grad_BNV, factor
        return total * factor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(f"{OP}: create_graph=True is not covered: the op has no second derivative")
        grad_BNV, ctx.kept = ctx.kept, None
        if grad_BNV is None:
            raise RuntimeError(f"{OP}: the gradient of logits must be used once, got a second backward")
        # Without 1 / denominator, under which half-precision gradients could vanish.
        torch.ops.effkern.scale_grad_(grad_BNV.view(-1, grad_BNV.shape[-1]), grad_outputs[0] * ctx.factor)
        return grad_BNV, None, None, None, None, None, None
