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
    the gradient of `weight` is accumulated over the chunks in float32.

    Args:
        hidden: last hidden states, [N, D], float32, bfloat16 or float16 (float64: reference only). Any strides.
        weight: output layer, [V, D], dtype of `hidden` (under autocast: any). Gets a gradient, as does `hidden`.
        labels: [N] int64 or int32, in [0, vocab_valid) or `ignore_index`. Already shifted by the caller (to drop a
            position, set its label to `ignore_index`; cutting the logits would copy them). A row with
            `ignore_index` gives exact zeros, whatever it holds.
        teacher: `TeacherLogits`, `TeacherHidden`, or None for cross entropy alone. Gets no gradient. It is read even
            where omega is 0: pass None once distillation is over.
        omega: weight of the distillation term in [0, 1]; a number, a 0-d tensor, or a tensor [N]. Required with a
            teacher. At 0 and 1 the other term is switched off, even where it is infinite.
        divergence: "forward_kl", sum_v p_v (log p_v - log q_v). p_v = 0 contributes 0; q_v = 0 < p_v gives inf.
        temperature: T > 0 of the student in D. Required with a teacher.
        teacher_temperature: T' > 0. Required with a teacher.
        bias: [V] or None. Gets a gradient.
        weights: w_n, [N], or None for ones. No gradient. A row of weight 0 has statistics, but adds nothing to loss
            and gradients, whatever it holds.
        label_smoothing: eps in [0, 1].
        z_loss: c >= 0.
        softcap: s > 0 for z = s tanh(logit_scale (...) / s), or None.
        logit_scale: factor on the raw logits.
        vocab_valid: entries of the vocabulary that count, for padded output layers; the rest of `weight` takes no
            part and gets a zero gradient. Student and teacher may be padded differently.
        reduction: "mean", "sum" or "none" (w_n L_n, [N]; its backward computes the logits again).
        denom: for "mean", the denominator: a number > 0 or a 0-d tensor, e.g. the token count of all accumulation
            steps and ranks. None: sum of w_n over the rows that count. A zero denominator gives a zero loss. No
            gradient.
        impl: "auto", "cpp" (CPU float32, bfloat16), "triton" (CUDA), "reference" (PyTorch alone, same chunks).
        chunk_bytes: budget of one V-wide float32 buffer. None: 32 MiB on a CPU, 1/64 of the memory of a GPU. One
            such buffer lives at a time, and a second one with TeacherHidden.

    Returns:
        DistillResult(loss, stats): loss is float32 (float64 for float64), 0-d, or [N] with "none", in nats; stats
        holds per-token statistics without gradient (see DistillStats).

    Raises:
        ValueError: a shape, a number, a label or omega breaks its rule.
        TypeError: an unsupported dtype or type.
        NotImplementedError: `impl` was named and cannot run here, or not in this dtype; or a second derivative
            (create_graph=True) is asked for. torch.func transforms are not covered either.

    Logits of +inf give an undefined (not finite) row. On a GPU, label and omega values are checked by asynchronous
    device assertions; nothing waits for the device. Under torch.compile, omega, denom and all sizes may change
    freely; every other number is a constant of the graph.

    Memory besides inputs and gradients: the chunk buffers above, O(N), and under autocast the weights in its type
    (impl="reference": some fifteen chunk buffers; "triton" with half-precision inputs: one more of that type). The
    gradients are computed in the forward pass and kept until backward, also inside an activation checkpoint; they
    take 4 V D bytes for `weight` until rounded to its type. With gradients disabled there is none of this.
    On a CPU a chunk's product for the weight gradient is rounded to bfloat16, if that is the inputs' type, before it
    is added in float32. Deterministic on a CPU for a given number of threads.
    Source: Rawat et al., arXiv 2410.18779, section 2 (mixed loss); chunking and row passes are our own.
    """
    checks.check_options(
        divergence, temperature, teacher_temperature, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
        reduction, chunk_bytes,
    )  # fmt: skip
    vocab = checks.check_tensors(hidden, weight, labels, bias, weights, vocab_valid)
    if teacher is not None:
        checks.check_teacher(teacher, hidden, vocab)
    checks.check_mixture(teacher, omega, temperature, teacher_temperature, reduction, denom, hidden)
    compute_dtype = _compute_dtype(hidden)
    chosen = _choose(impl, hidden, compute_dtype, teacher)

    acc = gemm.accumulator_dtype(compute_dtype)
    kept_N = labels != ignore_index
    weight_N = kept_N.to(acc) if weights is None else torch.where(kept_N, weights.detach().to(acc), 0.0)
    # Products, where torch.full and expand would do: a traced float stays a variable in them, and the result is packed.
    value = 0.0 if omega is None else omega
    omega_N = torch.ones_like(weight_N) * (value.detach().to(acc) if isinstance(value, Tensor) else value)
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
        divergence, float(temperature or 1.0), float(teacher_temperature or 1.0), float(label_smoothing),
        float(z_loss), None if softcap is None else float(softcap), float(logit_scale), t_cap, t_scale, ignore_index,
        vocab, compute_dtype, chosen,
    )  # fmt: skip
    grad_on = torch.is_grad_enabled()
    needs = tuple(grad_on and x is not None and x.requires_grad for x in (hidden, weight, bias))
    tensors = (hidden, weight, bias, labels, weight_N, omega_N, factor, t_logits, t_hidden, t_weight, t_bias)
    loss, stats_SN = _LinearDistill.apply(*tensors, scalars, needs, reduction, chunk_bytes)
    return DistillResult(loss, DistillStats(*stats_SN.unbind(0)))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Type of the matrix products: autocast's, as for any linear layer, else that of `x`."""
    if checks.autocasts(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
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
    if denom is None:
        count = weight_N.sum()
    else:
        count = weight_N.new_ones(()) * (denom.detach().to(weight_N.dtype) if isinstance(denom, Tensor) else denom)
    return torch.where(count == 0, 0.0, 1.0 / count)


def _apply_scale(grad: Tensor, factor: Tensor, dtype: torch.dtype, traced: bool) -> Tensor:
    """grad * factor in `dtype`. In place, unless the compiler, which reuses dead buffers itself, is tracing."""
    if traced:
        return (grad.to(factor.dtype) * factor).to(dtype)
    torch.ops.effkern.scale_grad_(grad, factor)
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
        others = (labels, inner, omega_N, t_logits, t_hidden, t_weight, t_bias)
        now = (False, False, False) if late else needs
        stats, *grads = torch.ops.effkern.linear_distill_fwd(
            hidden, weight, bias, *others, *scalars, list(now), chunk_bytes
        )

        ctx.scalars, ctx.needs, ctx.late, ctx.chunk_bytes = scalars, needs, late, chunk_bytes
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.unscaled = compute_dtype == torch.float16
        ctx.traced = torch.compiler.is_compiling()
        ctx.kept = ctx.others = None
        if ctx.traced:
            ctx.save_for_backward(factor, *((hidden, weight, bias, *others) if late else grads))
        elif any(needs):
            # What gets no gradient stays outside of the saved tensors, which refuse those of inference_mode.
            ctx.save_for_backward(hidden, weight, bias)
            ctx.others, ctx.factor = others, factor
            ctx.versions = [_version(x) for x in others]
            ctx.kept = None if late else grads
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        loss_N = torch.where(weight_N != 0, weight_N * stats[0], 0.0)
        if late:
            return loss_N, stats
        return torch.where(factor != 0, loss_N.sum() * factor, 0.0), stats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_loss = grad_outputs[0]
        nothing = (None,) * 12
        if grad_loss is None:
            return None, None, None, *nothing
        if torch.is_grad_enabled() and not ctx.traced:
            raise NotImplementedError(f"{OP}: create_graph=True is not covered: the op has no second derivative")
        if ctx.traced:
            factor, *saved = ctx.saved_tensors
        else:
            factor, saved = ctx.factor, ctx.kept
            ctx.kept = None
        if ctx.late or saved is None:
            grads = _rerun(ctx, saved, grad_loss)
        else:
            grads = saved
        if ctx.late:
            scaled = [g.to(d) if needed else None for g, d, needed in zip(grads, ctx.dtypes, ctx.needs)]
            return *scaled, *nothing
        scale = grad_loss * factor if ctx.unscaled else grad_loss
        scaled = [
            _apply_scale(g, scale, dtype, ctx.traced) if needed else None
            for g, dtype, needed in zip(grads, ctx.dtypes, ctx.needs)
        ]
        return *scaled, *nothing


def _version(x: Tensor | None) -> int | None:
    """Counts the writes to a tensor; tensors of inference_mode keep no count."""
    return None if x is None or x.is_inference() else x._version


def _rerun(ctx: Any, saved: Any, grad_loss: Tensor) -> list[Tensor]:
    """The gradients from the inputs, once more; with reduction="none" each row is scaled by its `grad_loss`."""
    if ctx.traced:
        hidden, weight, bias, *others = saved
    else:
        hidden, weight, bias = ctx.saved_tensors
        others = list(ctx.others)
        if [_version(x) for x in others] != ctx.versions:
            raise RuntimeError(f"{OP}: labels or teacher were modified in place between forward and this backward")
    if ctx.late:
        others[1] = torch.where(others[1] != 0, others[1] * grad_loss, 0.0)
    _, *grads = torch.ops.effkern.linear_distill_fwd(
        hidden, weight, bias, *others, *ctx.scalars, list(ctx.needs), ctx.chunk_bytes
    )
    return grads
