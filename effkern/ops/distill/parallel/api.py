"""`vocab_parallel_distill_loss`: the loss where every rank holds its slice of the output layer.

N tokens, D hidden size, V vocabulary, P ranks of the group; shape letters on tensors
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from effkern.ops.distill import arguments, checks, chunked, gemm, values
from effkern.ops.distill.parallel import agree, local
from effkern.ops.distill.parallel.agree import OP
from effkern.ops.distill.parallel.autograd import Call, ParallelDistill
from effkern.ops.distill.parallel.checks import check_arguments, check_teacher_values, check_whole, under_own_name
from effkern.ops.distill.types import DistillResult, DistillStats, Teacher


def vocab_parallel_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    slices: Sequence[int] | None = None,
    sequence_parallel: bool = False,
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
) -> DistillResult:
    """`effkern.linear_distill_loss` over an output layer whose rows are spread over the ranks of a group.

    z = softcap(logit_scale (hidden [weight_1; ...; weight_P]^T + bias)); everything else as in `linear_distill_loss`,
    whose options these are, with the same result to rounding. Every rank calls it in step, with the same hidden states,
    labels, omega and weights, and its own slice of the vocabulary; every rank gets the whole loss and all statistics.
    Sums run in float32 (float64 for float64) whatever the inputs are.

    Slices follow one another in the order of the ranks; padding (`vocab_valid`) is at the end of the whole, and a slice
    may be nothing but padding, or empty. DTensors are taken as they are: weight, bias and the teacher's weight sharded
    along the vocabulary (dense teachers along dimension 1), the rest replicated; gradients are DTensors of the same
    placement.

    Args:
        hidden: [N, D], the same on every rank. Its gradient is the sum over all ranks: do not reduce it again.
        weight: this rank's slice [V_r, D], V_r >= 0. Gets the gradient of the slice.
        labels: [N] over the whole vocabulary.
        group: process group or device mesh of one dimension. None: the weight's mesh, or all processes.
        slices: rows of every rank's slice, where they differ. None: all alike, or as the DTensor says.
        sequence_parallel: hidden is [N / P, D], this rank's rows, everything else of N rows whole; rows are gathered
            before, and the gradient is scattered after. Implied by a DTensor sharded along dimension 0.
        teacher: with its slice: `TeacherLogits`, `TeacherLogProbs` [N, V_r], `TeacherHidden` (hidden whole, weight and
            bias in slices); over the same entries as `weight`, but for the padding. Whole on every rank:
            `TeacherTopK` (its ids count over the whole vocabulary), `TeacherConfidence`, `TeacherSimilarity`.
        bias: [V_r] or None. Gets a gradient.
        vocab_valid: entries of the whole vocabulary that count.
        reduction: as there; the backward of "none" communicates again.
        denom: as there; for data parallelism on top of this see `effkern.distributed.global_count`.
        weight_grad: as there, for the slice.
        check: compare everything that should be the same over the ranks, labels included, and look at the values of the
            teacher. Sizes and options are always compared at the first call with them; an error on one rank is raised
            on all of them then, but not in later calls that differ from one rank to the other.
        impl: "reference" (PyTorch operations), "compile" (torch.compile fuses each phase of the row pass; CUDA only),
            or "auto": "compile" on CUDA, else "reference". No compiled phase has been run on a GPU yet.
        chunk_bytes: budget of one float32 buffer [C, max V_r]; the smallest of all ranks counts.
        others: as in `linear_distill_loss`.

    Returns:
        DistillResult(loss, stats), the same on every rank.

    Raises:
        ValueError, TypeError: as `linear_distill_loss`; or the ranks disagree.
        NotImplementedError: `impl` cannot run here, or a second derivative is asked for.
        RuntimeError: no process group.

    Communication: per chunk of rows one MAX of 2 numbers per row and one SUM of 3 (2 at temperature 1), in float32;
    with a sparse teacher 1 and 2 + K (3 + K with a tail bucket), cross entropy alone 1 and 1. To these come, in MAX and
    SUM, 0 and 1 for reverse and symmetric KL of a dense teacher, 2 and 4 for decoupled_kl, 2 and 5 for centered and
    zscored mse, 0 and 3 for cosine. jsd, skewed KL and tvd need one more SUM, of 1, as their gradient takes a sum over
    normalised p and q. Per call one SUM of 13 N statistics, and one of the gradient of `hidden` (sequence_parallel: a
    gather and a scatter). Forward KL at a temperature: 72 bytes per token, and D numbers in the type of `hidden` with a
    gradient: 8192 bytes for D = 4096 in bfloat16. Divergences are summed in their non-negative form, after
    normalisation, and travel with the statistics.

    Memory: as there, with V_r for V; N x V_r never exists. The first call gathers about a kilobyte per rank and, on
    CUDA, waits for it. Keep it out of traced code by torch.compiler.disable. Deterministic if the reductions are.
    Source: vocabulary-parallel cross entropy of Shoeybi et al., arXiv 1909.08053; its extension to divergences is ours.
    """
    sequence_parallel = sequence_parallel or local.is_sharded(hidden, 0)
    members = local.group_of(weight, group)
    spread = weight
    hidden = local.part("hidden", hidden, 0 if sequence_parallel else None, members)
    weight, bias = local.part("weight", weight, 0, members), local.part("bias", bias, 0, members)
    labels, weights, omega, denom = (
        local.part(name, x, None, members)
        for name, x in (("labels", labels), ("weights", weights), ("omega", omega), ("denom", denom))
    )
    teacher = local.teacher_part(teacher, members)

    lasting: dict[str, Any] = {
        "divergence": divergence, "alpha": alpha, "beta": beta, "temperature": temperature,
        "teacher_temperature": teacher_temperature, "t_squared": t_squared, "normalize_jsd": normalize_jsd,
        "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap,
        "logit_scale": logit_scale, "reduction": reduction,
    }  # fmt: skip
    numbers = {"omega": omega, "denom": denom, "num_kept": num_kept}
    error: Exception | None = None
    try:
        with under_own_name():
            checks.check_options(**lasting, chunk_bytes=chunk_bytes)
            check_arguments(
                hidden, weight, labels, bias, weights, weight_grad, teacher, omega, denom, num_kept, lasting,
                members.size() if sequence_parallel else 1,
            )  # fmt: skip
        slices = local.slices_of(spread, slices, members)
        layout = agree.place(slices, members.rank(), vocab_valid, weight.shape[0], local.slice_width(teacher))
        compiled = _compiles(impl, hidden.device)
    except (ValueError, TypeError, NotImplementedError) as caught:
        error = caught
    grad_on = torch.is_grad_enabled()
    needs = tuple(grad_on and isinstance(x, Tensor) and x.requires_grad for x in (hidden, weight, bias))
    lasting |= {"sequence_parallel": sequence_parallel, "gradient of hidden": needs[0], "check": check}
    lasting |= {"shape of hidden": None, "teacher": type(teacher).__name__, "kind": getattr(teacher, "kind", None)}
    passing: dict[str, Any] = {name: None if isinstance(x, Tensor) else x for name, x in numbers.items()}
    lasting |= {"rows of all slices of weight": slices, "vocab_valid": vocab_valid, "chunk_bytes": chunk_bytes}
    own_budget = 0
    if error is None:
        lasting["shape of hidden"] = (hidden.shape[1], str(hidden.dtype), hidden.device.type)
        passing["number of tokens"] = labels.shape[0]
        if check:
            passing["labels"] = agree.label_sum(labels)
        own_budget = chunk_bytes or chunked.chunk_bytes(hidden.device)
    budget = agree.budget(members, own_budget, lasting=lasting, passing=passing, error=error, check=check)
    with under_own_name():
        check_whole(teacher, labels, divergence, teacher_temperature, layout.vocab)

    compute_dtype = arguments.compute_dtype_of(hidden)
    x = arguments.settle(
        teacher, labels, divergence=divergence, alpha=alpha, beta=beta, temperature=temperature,
        teacher_temperature=teacher_temperature, t_squared=t_squared, normalize_jsd=normalize_jsd, omega=omega,
        weights=weights, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, reduction=reduction, denom=denom, dtype=gemm.accumulator_dtype(compute_dtype),
    )  # fmt: skip
    with under_own_name():
        values.check_rows(labels, x.omega_N, ignore_index, layout.vocab, num_kept)
        if check:
            check_teacher_values(x.source, x.options, labels, layout, members)
    call = Call(
        labels, x.weight_N, x.omega_N, x.factor, x.source, x.options, layout, budget,
        agree.reductions(members, sequence_parallel), needs, reduction == "none", num_kept, weight_grad, compute_dtype,
        compiled,
    )  # fmt: skip
    loss, stats_SN = ParallelDistill.apply(hidden, weight, bias, call)
    return DistillResult(loss, DistillStats(*stats_SN.unbind(0)))


def _compiles(impl: str, device: torch.device) -> bool:
    """Whether the row pass is compiled."""
    if impl not in ("auto", "reference", "compile"):
        raise ValueError(f"{OP}: impl must be one of 'auto', 'reference', 'compile', got {impl!r}")
    if impl == "compile" and device.type != "cuda":
        raise NotImplementedError(f"{OP}: impl='compile' cannot run on {device}: it is meant for CUDA")
    return impl == "compile" or (impl == "auto" and device.type == "cuda")
