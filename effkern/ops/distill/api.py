"""`linear_distill_loss`: output layer, hard-label loss and distillation loss in one op that never holds N x V.

N tokens, D hidden size, V vocabulary; shape letters on tensors
"""

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.distill import arguments, checks, gemm
from effkern.ops.distill import schema as _schema  # noqa: F401  (defines the operators)
from effkern.ops.distill.arguments import OP
from effkern.ops.distill.autograd import LinearDistill
from effkern.ops.distill.check_teachers import check_teacher
from effkern.ops.distill.types import DistillResult, DistillStats, Teacher

registry.register(OP, registry.cpp(), registry.triton(), registry.reference())


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
            steps and ranks (its value is not looked at). None: sum of w_n over the rows that count. A zero denominator
            gives a zero loss. No gradient.
        num_kept: number of rows whose label is not `ignore_index`, if the caller knows it: on a GPU it allows to
            leave them out of the products without waiting for the device. On a CPU they always are left out.
        weight_grad: float32 [V, D] (float64 for float64) or None. Given: the gradient of `weight`, if it
            requires one, is added to it during this call, backward returns none for `weight`, and the gradient of
            the loss must be 1 there. Saves 4 V D bytes and a pass over them. Refused inside of a non-reentrant
            activation checkpoint, which would run this call twice.
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
    On a CPU that does not multiply bfloat16 (AVX512-BF16) a chunk's product for the weight gradient is rounded to
    bfloat16, if that is the inputs' type, before it is added in float32.
    Deterministic on a CPU for a given number of threads.
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
    compute_dtype = arguments.compute_dtype_of(hidden)
    chosen = arguments.choose(impl, hidden, compute_dtype, teacher)

    x = arguments.settle(
        teacher, labels, divergence=divergence, alpha=alpha, beta=beta, temperature=temperature,
        teacher_temperature=teacher_temperature, t_squared=t_squared, normalize_jsd=normalize_jsd, omega=omega,
        weights=weights, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, reduction=reduction, denom=denom, dtype=gemm.accumulator_dtype(compute_dtype),
    )  # fmt: skip
    given = x.source
    scalars = (given.kind, given.logit_scale, given.softcap, *x.options, vocab, compute_dtype, chosen, check)
    grad_on = torch.is_grad_enabled()
    needs = tuple(grad_on and x is not None and x.requires_grad for x in (hidden, weight, bias))
    tensors = (hidden, weight, bias, labels, x.weight_N, x.omega_N, x.factor)
    may_stream = impl in ("auto", "reference")
    extras = (num_kept, chunk_bytes, memory_limit, may_stream, weight_grad)
    # Always three: without gradients torch.compile tells by the number of arguments whether forward takes a ctx, and
    # the variable number of two would be the wrong answer.
    teacher_tensors = (*given.tensors, None, None, None)[:3]
    loss, stats_SN = LinearDistill.apply(*tensors, scalars, needs, reduction, extras, *teacher_tensors)
    return DistillResult(loss, DistillStats(*stats_SN.unbind(0)))
