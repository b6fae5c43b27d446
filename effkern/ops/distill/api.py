"""`linear_distill_loss`: output layer, hard-label loss and distillation loss in one op that never holds N x V.

N tokens, D hidden size, V vocabulary; shape letters on tensors
"""

from typing import Any

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.distill import checks, gemm
from effkern.ops.distill import schema as _schema  # noqa: F401  (defines the operators)
from effkern.ops.distill.types import DistillResult, DistillStats, Teacher, TeacherHidden, TeacherLogits

OP = "linear_distill_loss"
registry.register(OP, registry.cpp(), registry.triton(), registry.reference())


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    teacher: Teacher | None = None,
    omega: float | Tensor | None = None,
    divergence: str = "forward_kl",
    temperature: float | None = None,
    teacher_temperature: float | None = None,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_valid: int | None = None,
    reduction: str = "mean",
    denom: float | Tensor | None = None,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> DistillResult:
    """Cross entropy mixed with distillation, straight from the hidden states.

    z = softcap(logit_scale (hidden weight^T + bias)),  q = softmax(z / T),  p = softmax(u / T'),  u = teacher logits
    L_n = (1 - omega) CE_n + omega D(p_n, q_n) + z_loss lse(z_n)^2
    CE_n = lse(z_n) - (1 - eps) z_ny - (eps / V) sum_v z_nv   at temperature 1, eps = label_smoothing
    loss = sum_n w_n L_n / denom, over rows whose label is not `ignore_index`

    No factor T^2 is applied to D. The logits exist one chunk of rows at a time, in float32 whatever the inputs are;
    the gradient of `weight` is accumulated over the chunks in float32 and rounded once.

    Args:
        hidden: last hidden states, [N, D], float32, bfloat16 or float16 (float64: reference only). Any strides.
        weight: output layer, [V, D], dtype of `hidden` (under autocast: any). Gets a gradient, as does `hidden`.
        labels: [N] int64 or int32, in [0, vocab_valid) or `ignore_index`. Already shifted by the caller. A row
            with `ignore_index` gives exact zeros, whatever its hidden states hold.
        teacher: `TeacherLogits`, `TeacherHidden`, or None for cross entropy alone. Gets no gradient.
        omega: weight of the distillation term in [0, 1]; a number, a 0-d tensor, or a tensor [N]. Required with a
            teacher. At 0 and 1 the other term is switched off, even where it is infinite.
        divergence: "forward_kl", sum_v p_v (log p_v - log q_v). p_v = 0 contributes 0; q_v = 0 < p_v gives inf.
        temperature: T > 0 of the student in D. Required with a teacher.
        teacher_temperature: T' > 0. Required with a teacher.
        bias: [V] or None. Gets a gradient.
        weights: w_n, [N], or None for ones. No gradient.
        label_smoothing: eps in [0, 1].
        z_loss: c >= 0.
        softcap: s > 0 for z = s tanh(logit_scale (...) / s), or None.
        logit_scale: factor on the raw logits.
        vocab_valid: entries of the vocabulary that count, for padded output layers; the rest of `weight` takes no
            part and gets a zero gradient. Student and teacher may be padded differently.
        reduction: "mean", "sum" or "none" (w_n L_n, [N]; its backward computes the logits again).
        denom: for "mean", the denominator: a number > 0 or a 0-d tensor, e.g. the token count of all accumulation
            steps and ranks. None: sum of w_n over the rows that count. A zero denominator gives a zero loss.
        impl: "auto", "cpp" (CPU float32, bfloat16), "triton" (CUDA), "reference" (PyTorch alone, same chunks).
        chunk_bytes: budget of one V-wide float32 buffer. None: 32 MiB on a CPU, 1/64 of the memory of a GPU. One
            such buffer lives at a time, and a second one with TeacherHidden.

    Returns:
        DistillResult(loss, stats): loss is float32 (float64 for float64), 0-d, or [N] with "none", in nats; stats
        holds per-token statistics without gradient (see DistillStats).

    Raises:
        ValueError: a shape, a number, a label or omega breaks its rule.
        TypeError: an unsupported dtype or type.
        NotImplementedError: `impl` was named and cannot run here, or not in this dtype.

    On a GPU, label and omega values are checked by asynchronous device assertions; nothing waits for the device.
    Memory besides inputs and gradients: the chunk buffers above and O(N). The gradients are computed in the forward
    pass, where they take 4 V D bytes for `weight` until rounded to its type; with gradients disabled, none of it.
    Deterministic on a CPU for a given number of threads.
    Source: Rawat et al., arXiv 2410.18779, section 2 (mixed loss); chunking and row passes are our own.
    """
    vocab = checks.check_tensors(hidden, weight, labels, bias, weights, vocab_valid, ignore_index)
    if teacher is not None:
        checks.check_teacher(teacher, hidden, vocab)
    checks.check_numbers(
        teacher, omega, divergence, temperature, teacher_temperature, label_smoothing, z_loss, softcap, logit_scale,
        reduction, denom, hidden, chunk_bytes,
    )  # fmt: skip
    compute_dtype = _compute_dtype(hidden)
    chosen = _choose(impl, hidden, compute_dtype, teacher)

    acc = gemm.accumulator_dtype(compute_dtype)
    kept_N = labels != ignore_index
    weight_N = kept_N.to(acc) if weights is None else torch.where(kept_N, weights.detach().to(acc), 0.0)
    if isinstance(omega, Tensor):
        omega_N = omega.detach().to(acc).expand(hidden.shape[0]).contiguous()
    else:
        omega_N = torch.full((hidden.shape[0],), 0.0 if omega is None else omega, dtype=acc, device=hidden.device)
    factor = _factor(reduction, denom, weight_N)

    t_logits = t_hidden = t_weight = t_bias = None
    t_cap, t_scale = None, 1.0
    if isinstance(teacher, TeacherLogits):
        t_logits = teacher.logits.detach()
    elif isinstance(teacher, TeacherHidden):
        t_dtype = _compute_dtype(teacher.hidden)
        t_hidden, t_weight = teacher.hidden.detach().to(t_dtype), teacher.weight.detach().to(t_dtype)
        t_bias = None if teacher.bias is None else teacher.bias.detach()
        t_cap, t_scale = teacher.softcap, float(teacher.logit_scale)

    scalars = (
        divergence, float(temperature or 1.0), float(teacher_temperature or 1.0), label_smoothing, z_loss,
        None if softcap is None else float(softcap), float(logit_scale), t_cap, t_scale, ignore_index, vocab,
        compute_dtype, chosen,
    )  # fmt: skip
    grad_on = torch.is_grad_enabled()
    needs = tuple(grad_on and x is not None and x.requires_grad for x in (hidden, weight, bias))
    tensors = (hidden, weight, bias, labels, weight_N, omega_N, factor, t_logits, t_hidden, t_weight, t_bias)
    loss, stats_SN = _LinearDistill.apply(*tensors, scalars, needs, reduction, chunk_bytes)
    return DistillResult(loss, DistillStats(*stats_SN.unbind(0)))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Type of the matrix products: autocast's, as for any linear layer, else that of `x`."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _choose(impl: str, hidden: Tensor, compute_dtype: torch.dtype, teacher: Teacher | None) -> str:
    """The implementation for this device and these dtypes."""
    chosen = registry.choose(OP, impl, hidden.device)
    supported = (torch.float32, torch.bfloat16) if chosen == "cpp" else (torch.float32, torch.bfloat16, torch.float16)
    dtypes = [compute_dtype]
    if isinstance(teacher, TeacherLogits):
        dtypes.append(teacher.logits.dtype)
    if isinstance(teacher, TeacherHidden):
        # Its logits are ours, in float32; only float64 would make them wider than the kernels take.
        dtypes.append(torch.float64 if teacher.hidden.dtype == torch.float64 else torch.float32)
    wrong = [d for d in dtypes if d not in supported]
    if chosen == "reference" or not wrong:
        return chosen
    if impl == "auto":
        return "reference"
    raise NotImplementedError(f"{OP}: impl={impl!r} does not cover {str(wrong[0])[6:]} tensors")


def _factor(reduction: str, denom: float | Tensor | None, weight_N: Tensor) -> Tensor:
    """1 / denominator as a 0-d tensor, 0 where the denominator is 0; 1 unless the reduction is "mean"."""
    if reduction != "mean":
        return weight_N.new_ones(())
    count = weight_N.sum() if denom is None else torch.as_tensor(denom, dtype=weight_N.dtype, device=weight_N.device)
    return torch.where(count == 0, 0.0, 1.0 / count)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """grad * factor in `dtype`. On a CPU a factor of exactly 1 costs nothing."""
    if not in_place:
        return (grad * factor).to(dtype)
    if factor.device.type != "cpu" or factor.item() != 1.0:
        grad *= factor.to(grad.dtype)
    return grad.to(dtype)


class _LinearDistill(torch.autograd.Function):
    """Gradients are computed with the losses and kept until backward, which only scales them.

    The first backward takes the kept gradients and scales them in place. A second one (retain_graph=True), and
    reduction="none", whose row factors are unknown until then, run the op again.
    """

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, weight_N, omega_N, factor, t_logits, t_hidden, t_weight,
                t_bias, scalars, needs, reduction, chunk_bytes):  # fmt: skip
        late = reduction == "none"
        compute_dtype = scalars[-2]
        # float16 gradients leave the row pass without 1 / denom, under which they could vanish.
        inner = weight_N if compute_dtype == torch.float16 else weight_N * factor
        inputs = (hidden, weight, bias, labels, inner, omega_N, t_logits, t_hidden, t_weight, t_bias)
        now = (False, False, False) if late else needs
        stats, *grads = torch.ops.effkern.linear_distill_fwd(*inputs, *scalars, list(now), chunk_bytes)

        ctx.scalars, ctx.needs, ctx.late, ctx.chunk_bytes = scalars, needs, late, chunk_bytes
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.unscaled = compute_dtype == torch.float16
        ctx.compiled = torch.compiler.is_compiling()
        ctx.kept = None
        if ctx.compiled and not late:
            ctx.save_for_backward(factor, *grads)
        elif any(needs):
            ctx.save_for_backward(factor, *inputs)
            ctx.kept = None if late else grads
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        loss_N = torch.where(weight_N != 0, weight_N * stats[0], 0.0)
        return (loss_N if late else loss_N.sum() * factor), stats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_loss = grad_outputs[0]
        nothing = (None,) * 12
        if grad_loss is None:
            return None, None, None, *nothing
        if ctx.compiled and not ctx.late:
            factor, *grads = ctx.saved_tensors
        elif ctx.kept is not None:
            factor, grads = ctx.saved_tensors[0], ctx.kept
            ctx.kept = None
        else:
            factor, *inputs = ctx.saved_tensors
            if ctx.late:
                inputs[4] = inputs[4] * grad_loss
            _, *grads = torch.ops.effkern.linear_distill_fwd(*inputs, *ctx.scalars, list(ctx.needs), ctx.chunk_bytes)
        if ctx.late:
            grad_loss = torch.ones_like(factor)
        scale = grad_loss * factor if ctx.unscaled else grad_loss
        scaled = [
            _scaled(g, scale, dtype, not ctx.compiled) if needed else None
            for g, dtype, needed in zip(grads, ctx.dtypes, ctx.needs)
        ]
        return *scaled, *nothing
