"""`linear_distill_loss`: output layer, hard-label loss and distillation loss in one op that never holds N x V.

N tokens, D hidden size, V vocabulary; shape letters on tensors
"""

from typing import Any

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.distill import checks, gemm
from effkern.ops.distill import schema as _schema  # noqa: F401  (defines the operators)
from effkern.ops.distill.check_teachers import check_teacher
from effkern.ops.distill.rows import RowOptions
from effkern.ops.distill.teachers import Source
from effkern.ops.distill.types import (
    DistillResult,
    DistillStats,
    Teacher,
    TeacherConfidence,
    TeacherLogits,
    TeacherLogProbs,
    TeacherSimilarity,
    TeacherTopK,
)

OP = "linear_distill_loss"
registry.register(OP, registry.cpp(), registry.triton(), registry.reference())

# Fields of the teacher classes that hold floating-point tensors of kernels.
TEACHER_FLOATS = ("logits", "logprobs", "hidden", "table", "prob")


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    teacher: Teacher | None = None,
    omega: float | Tensor | None = None,
    divergence: str = "forward_kl",
    alpha: float | None = None,
    beta: float | None = None,
    temperature: float | None = None,
    teacher_temperature: float | None = None,
    t_squared: bool = False,
    normalize_jsd: bool = False,
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
    num_kept: int | None = None,
    weight_grad: Tensor | None = None,
    check: bool = False,
    impl: str = "auto",
    chunk_bytes: int | None = None,
    memory_limit: int | None = None,
) -> DistillResult:
    """Cross entropy mixed with distillation, straight from the hidden states.

    z = softcap(logit_scale (hidden weight^T + bias)),  q = softmax(z / T),  p = softmax(u / T'),  u = teacher logits
    L_n = (1 - omega) CE_n + omega D(p_n, q_n) + z_loss lse(z_n)^2
    CE_n = lse(z_n) - (1 - eps) z_ny - (eps / V) sum_v z_nv   at temperature 1, eps = label_smoothing
    loss = sum_n w_n L_n / denom, over rows whose label is not `ignore_index`

    With r = log q - log p, and D by `divergence`:
    forward_kl        sum p (log p - log q)
    reverse_kl        sum q (log q - log p)
    symmetric_kl      beta forward_kl + (1 - beta) reverse_kl
    jsd               beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q: beta is the teacher's share
    skew_forward_kl   KL(p, alpha p + (1 - alpha) q)
    skew_reverse_kl   KL(q, (1 - alpha) p + alpha q)
    tvd               1/2 sum |p - q|
    decoupled_kl      alpha KL(label against rest) + beta KL(p, q renormalised off the label)
    mse               1/V sum (z - u)^2; centered_mse: each minus its mean; zscored_mse: also over its deviation
    cosine            1 - cos(z, u)
    0 log 0 = 0. A divergence that is infinite (forward: q = 0 < p, reverse: p = 0 < q) makes its row infinite: mask
    an entry by -inf in both models. The last four act on the logits, at temperature 1, without masks.

    The logits exist one chunk of rows at a time, in float32 whatever the inputs are;
    the gradient of `weight` is accumulated over the chunks in float32.

    Args:
        hidden: last hidden states, [N, D], float32, bfloat16 or float16 (float64: reference only). Any strides.
        weight: output layer, [V, D], dtype of `hidden` (under autocast: any). Gets a gradient, as does `hidden`.
        labels: [N] int64 or int32, in [0, vocab_valid) or `ignore_index`. Already shifted by the caller (to drop a
            position, set its label to `ignore_index`; cutting the logits would copy them). A row with
            `ignore_index` gives exact zeros, whatever it holds.
        teacher: `TeacherLogits`, `TeacherHidden`, `TeacherLogProbs`, `TeacherTopK`, `TeacherConfidence`,
            `TeacherSimilarity`, or None for cross entropy alone. Gets no gradient. It is read even where omega is 0:
            pass None once distillation is over.
        omega: weight of the distillation term in [0, 1]; a number, a 0-d tensor, or a tensor [N]. Required with a
            teacher. At 0 and 1 the other term is switched off, even where it is infinite.
        divergence: see above. Sparse teachers and confidences serve "forward_kl" (tail buckets also "reverse_kl").
        alpha, beta: parameters of the divergence, required where it has them: beta in [0, 1] (jsd: inside of it),
            alpha of the skewed ones in [0, 1), both of decoupled_kl >= 0.
        temperature: T > 0 of the student in D. Required with a teacher, 1 or None with logit losses.
        teacher_temperature: T' > 0, likewise; 1 or None with a TeacherTopK whose rest matters, as its masses are
            those that it was cut at.
        t_squared: multiply D by T^2 (of the student), which keeps its gradient's size as T grows.
        normalize_jsd: divide by beta (1 - beta), so that beta -> 0 gives forward_kl and beta -> 1 reverse_kl, both
            ends included.
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
        num_kept: number of rows whose label is not `ignore_index`, if the caller knows it: on a GPU it allows to
            leave them out of the products without waiting for the device. On a CPU they always are left out.
        weight_grad: float32 [V, D] (float64 for float64) or None. Given: the gradient of `weight` is added to it
            during this call, backward returns none for `weight`, and the gradient of the loss must be 1 there.
            Saves 4 V D bytes and a pass over them.
        check: look at every value of the teacher first, and say what is wrong. Without it, on a row that counts:
            NaN gives a row of NaN; ids out of range are empty slots, repeated ids add up, masses above 1 leave no
            tail, and a row without entries has the mass 0.
        impl: "auto", "cpp" (CPU float32, bfloat16), "triton" (CUDA), "reference" (PyTorch alone, same chunks).
        chunk_bytes: budget of one V-wide float32 buffer. None: 32 MiB on a CPU, 1/64 of the memory of a GPU. One
            such buffer lives at a time, and a second one with TeacherHidden.
        memory_limit: bytes beyond inputs and returned gradients that may be used, or None for what the default chunks
            take. Given: the cost model takes the fastest of larger chunks, a single one, and (impl "auto" or
            "reference") slices of the vocabulary, whose logits are computed twice but which need no V x D
            accumulators; `effkern bench distill --explain` shows its table. A wish: if nothing fits, the smallest.

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
        divergence, alpha, beta, normalize_jsd, t_squared, temperature, teacher_temperature, ignore_index,
        label_smoothing, z_loss, softcap, logit_scale, reduction, chunk_bytes,
    )  # fmt: skip
    vocab = checks.check_tensors(hidden, weight, labels, bias, weights, vocab_valid)
    if teacher is not None:
        check_teacher(teacher, hidden, vocab, divergence, teacher_temperature)
    checks.check_mixture(teacher, divergence, omega, temperature, teacher_temperature, reduction, denom, hidden)
    checks.check_extras(weight, num_kept, weight_grad, reduction, chunk_bytes, memory_limit)
    compute_dtype = _compute_dtype(hidden)
    chosen = _choose(impl, hidden, compute_dtype, teacher)

    acc = gemm.accumulator_dtype(compute_dtype)
    kept_N = labels != ignore_index
    weight_N = kept_N.to(acc) if weights is None else torch.where(kept_N, weights.detach().to(acc), 0.0)
    # Products, where torch.full and expand would do: a traced float stays a variable in them, and the result is packed.
    value = 0.0 if omega is None else omega
    omega_N = torch.ones_like(weight_N) * (value.detach().to(acc) if isinstance(value, Tensor) else value)
    factor = _factor(reduction, denom, weight_N)

    given, kind, t_teacher = _source(teacher, labels, divergence, teacher_temperature)
    t_student = float(temperature or 1.0)
    name, scale = _normalized(divergence, beta) if normalize_jsd else (divergence, 1.0)
    scale *= t_student**2 if t_squared else 1.0
    options = RowOptions(
        name, float(alpha or 0.0), float(beta or 0.0), scale, kind, t_student, t_teacher, float(label_smoothing),
        float(z_loss), None if softcap is None else float(softcap), float(logit_scale), ignore_index,
    )  # fmt: skip
    scalars = (given.kind, given.logit_scale, given.softcap, *options, vocab, compute_dtype, chosen, check)
    grad_on = torch.is_grad_enabled()
    needs = tuple(grad_on and x is not None and x.requires_grad for x in (hidden, weight, bias))
    tensors = (hidden, weight, bias, labels, weight_N, omega_N, factor)
    may_stream = impl in ("auto", "reference")
    extras = (num_kept, chunk_bytes, memory_limit, may_stream, weight_grad)
    # Always three: without gradients torch.compile tells by the number of arguments whether forward takes a ctx, and
    # the variable number of two would be the wrong answer.
    teacher_tensors = (*given.tensors, None, None, None)[:3]
    loss, stats_SN = _LinearDistill.apply(*tensors, scalars, needs, reduction, extras, *teacher_tensors)
    return DistillResult(loss, DistillStats(*stats_SN.unbind(0)))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Type of the matrix products: autocast's, as for any linear layer, else that of `x`."""
    if checks.autocasts(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _normalized(divergence: str, beta: float | None) -> tuple[str, float]:
    """A JSD over beta (1 - beta), with its limits."""
    assert beta is not None
    if beta in (0, 1):
        return ("forward_kl" if beta == 0 else "reverse_kl"), 1.0
    return divergence, 1.0 / (beta * (1.0 - beta))


def _source(
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
        return Source("table", (teacher.table.detach(), *prob)), kind, t
    dtype = _compute_dtype(teacher.hidden)
    bias = () if teacher.bias is None else (teacher.bias.detach(),)
    tensors = (teacher.hidden.detach().to(dtype), teacher.weight.detach().to(dtype), *bias)
    return Source("hidden", tensors, float(teacher.logit_scale), teacher.softcap), "logits", t


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kept_logprobs(teacher: TeacherTopK) -> Tensor:
    logprobs = _wide(teacher.logprobs.detach())
    return logprobs if teacher.lse is None else logprobs - teacher.lse.detach()[:, None].to(logprobs.dtype)


def _choose(impl: str, hidden: Tensor, compute_dtype: torch.dtype, teacher: Teacher | None) -> str:
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
    def forward(ctx: Any, hidden, weight, bias, labels, weight_N, omega_N, factor, scalars, needs, reduction, extras,
                *teacher):  # fmt: skip
        teacher = tuple(x for x in teacher if x is not None)
        late = reduction == "none"
        compute_dtype = scalars[-3]
        # float16 gradients leave the row pass without 1 / denom, under which they could vanish.
        inner = weight_N if compute_dtype == torch.float16 else weight_N * factor
        rows = (labels, inner, omega_N)
        now = (False, False, False) if late else needs
        stats, *grads = _call_op(hidden, weight, bias, rows, teacher, scalars, now, extras)

        ctx.scalars, ctx.late, ctx.extras = scalars, late, extras
        # What went into weight_grad has no gradient of its own, and must not go there twice.
        ctx.needs = needs if extras[-1] is None else (needs[0], False, needs[2])
        ctx.into = extras[-1] is not None and needs[1]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.unscaled = compute_dtype == torch.float16
        ctx.traced = torch.compiler.is_compiling()
        ctx.kept = ctx.others = None
        if ctx.traced:
            ctx.save_for_backward(factor, *((hidden, weight, bias, *rows, *teacher) if late else grads))
        elif any(needs):
            # What gets no gradient stays outside of the saved tensors, which refuse those of inference_mode.
            ctx.save_for_backward(hidden, weight, bias)
            ctx.others, ctx.factor = (*rows, *teacher), factor
            ctx.versions = [_version(x) for x in ctx.others]
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
        nothing = (None,) * (len(ctx.needs_input_grad) - 3)
        if grad_loss is None:
            return None, None, None, *nothing
        if torch.is_grad_enabled() and not ctx.traced:
            raise NotImplementedError(f"{OP}: create_graph=True is not covered: the op has no second derivative")
        if ctx.into:
            _check_unit(grad_loss)
        if ctx.traced:
            factor, *saved = ctx.saved_tensors
        else:
            factor, saved = ctx.factor, ctx.kept
            ctx.kept = None
        grads = _rerun(ctx, saved, grad_loss) if ctx.late or saved is None else saved
        if ctx.late:
            scaled = [g.to(d) if needed else None for g, d, needed in zip(grads, ctx.dtypes, ctx.needs)]
            return *scaled, *nothing
        scale = grad_loss * factor if ctx.unscaled else grad_loss
        scaled = [
            _apply_scale(g, scale, dtype, ctx.traced) if needed else None
            for g, dtype, needed in zip(grads, ctx.dtypes, ctx.needs)
        ]
        return *scaled, *nothing


def _call_op(hidden, weight, bias, rows, teacher, scalars, needs, extras) -> Any:
    return torch.ops.effkern.linear_distill_fwd(
        hidden, weight, bias, *rows, list(teacher), *scalars, list(needs), *extras
    )


def _check_unit(grad_loss: Tensor) -> None:
    """The gradient is in weight_grad already: it cannot be multiplied any more."""
    if grad_loss.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async((grad_loss == 1).all(), f"{OP}: with weight_grad the gradient of the loss must be 1")
    elif grad_loss.item() != 1:
        got = grad_loss.item()
        raise RuntimeError(f"{OP}: with weight_grad the gradient of the loss must be 1 (scale by denom), got {got}")


def _version(x: Tensor | None) -> int | None:
    """Counts the writes to a tensor; tensors of inference_mode keep no count."""
    return None if x is None or x.is_inference() else x._version


def _rerun(ctx: Any, saved: Any, grad_loss: Tensor) -> list[Tensor]:
    """The gradients from the inputs, once more; with reduction="none" each row is scaled by its `grad_loss`."""
    if ctx.traced:
        hidden, weight, bias, labels, inner, omega_N, *teacher = saved
    else:
        hidden, weight, bias = ctx.saved_tensors
        labels, inner, omega_N, *teacher = ctx.others
        if [_version(x) for x in ctx.others] != ctx.versions:
            raise RuntimeError(f"{OP}: labels or teacher were modified in place between forward and this backward")
    if ctx.late:
        inner = torch.where(inner != 0, inner * grad_loss, 0.0)
    rows, extras = (labels, inner, omega_N), (*ctx.extras[:-1], None)
    _, *grads = _call_op(hidden, weight, bias, rows, teacher, ctx.scalars, ctx.needs, extras)
    return grads
