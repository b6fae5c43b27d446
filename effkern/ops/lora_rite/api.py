"""lora_rite_step_: one step of LoRA-RITE for groups of factors; lora_rite_rebuild_: bases of factors as they are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops.lora_rite import stages
from effkern.ops.lora_rite.advance import advance_
from effkern.ops.lora_rite.group import OP, RiteGroup, check_grads
from effkern.ops.lora_rite.reference import RiteOptions
from effkern.ops.lora_rite.stages import Products, Reduce
from effkern.ops.lora_rite.subset import put_back, subset
from effkern.ops.lora_rite.terms import terms_of

Rate = float | Tensor


@torch.no_grad()
def lora_rite_step_(
    groups: Sequence[RiteGroup],
    grads: Sequence[Sequence[Tensor | None]],
    lrs: Sequence[Rate],
    options: Sequence[RiteOptions],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    reduce: Reduce | None = None,
    impl: str = "auto",
) -> Tensor:
    """One LoRA-RITE step of all pairs of all groups, in place; `reference.rite_step` states the formula.

    Differences of form alone: a basis is X W with W from Gram matrices ("whitened Gram"): y = X_new W_old has a Gram
    matrix near I, so that float32 products of y keep what float32 products of X would lose, and all r x r work is
    float64. Any orthonormal basis gives the same X; here it is the one in which V is diagonal.

    Args:
        groups: of `new_group`, after `lora_rite_rebuild_`. Factors, moments and all state are written in place.
        grads: for each group one gradient per factor, of the factor's shape; other dtypes and layouts are copied. A
            pair with None is left out of this step: its state and step count stay.
        lrs: for each group a number, or a tensor on the groups' device: 0-d, or [F], a rate per factor.
        options: of each group; all share clip_grad and skip_rms.
        grad_scale: 0-d, what gradients are to be multiplied with (1 / the loss scale).
        found_inf: 0-d or [1]; not 0: nothing is written.
        reduce: called with (group, x) for every sum over rows, x [F, ...] float64 with the factors of that group; it
            returns the sum over all processes that hold rows of them. A group's `rows` must be those of all processes.
        impl: "auto", "cpp" (CPU, float32), "triton" (CUDA, float32, r <= 16; r x r work by effkern._C_cuda where it is
            built), "plain" (any device, float32 and float64).

    Returns:
        0-d float64: squared norm of all unmagnified gradients before clipping. Not finite: the step was skipped, and
        no state was touched.

    Raises:
        ValueError: shapes, devices or lengths that do not fit, options that must be shared and are not.
        TypeError: a gradient or a rate is no tensor or number.
        NotImplementedError: impl does not cover the device or the dtype.

    Memory: r x r matrices, and tiles; with impl="plain" copies of one factor. Deterministic: "cpp" gives the same bits
    whatever the number of threads. On CUDA "triton" with effkern._C_cuda reads nothing on the host and takes five
    launches per group; addresses go to the device when they change, so that a CUDA graph can hold the step. "plain",
    and "triton" without that module, wait for the device in torch.linalg.eigh.
    Source: see reference.rite_step; the whitened Gram form is our own.
    """
    if not len(groups) == len(grads) == len(lrs) == len(options):
        lengths = f"{len(groups)}, {len(grads)}, {len(lrs)}, {len(options)}"
        raise ValueError(f"{OP}: groups, grads, lrs and options must be of one length, got {lengths}")
    if not groups:
        raise ValueError(f"{OP}: groups must hold at least one group, got none")
    first = options[0]
    if any((o.clip_grad, o.skip_rms) != (first.clip_grad, first.skip_rms) for o in options):
        raise ValueError(f"{OP}: options must share clip_grad and skip_rms, which look at all groups together")
    active = [subset(group, of_group) for group, of_group in zip(groups, grads)]
    parts = []
    for part, lr, o in zip(active, lrs, options):
        if part is not None:
            given = check_grads(part.grads, part.group)
            parts.append((part, given, part.rates(_rates(lr, part.whole)), terms_of(o)))
    device = groups[0].whiten.device
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    scale = None if grad_scale is None else _number("grad_scale", grad_scale).double().reshape(())
    grams, traces = [], []
    for part, given, _, terms in parts:
        group = part.group
        h, trace = stages.unmagnified(group, given, terms.skip_rms, scale, reduce, impl)
        grams.append(h)
        traces.append(trace)
    # Pairs of one model may live on several devices; the clip looks at all of them.
    all_traces = torch.cat([x.to(traces[0].device) for x in traces]) if len(traces) > 1 else traces[0]
    if found_inf is not None:
        found = _number("found_inf", found_inf).double().reshape(())
        all_traces = torch.where(found != 0, float("nan"), all_traces)
    gate = all_traces
    for (part, given, rates, terms), h in zip(parts, grams):
        group = part.group
        seen = all_traces.to(group.whiten.device)
        update = stages.precondition_(group, h, seen, rates, scale, terms, impl)
        advance_(group, given, update, terms.tolerance, reduce, impl)
        put_back(part)
        gate = update.gate
    return gate


@torch.no_grad()
def lora_rite_rebuild_(
    group: RiteGroup,
    options: RiteOptions,
    *,
    keep_moments: bool = True,
    reduce: Reduce | None = None,
    impl: str = "auto",
) -> None:
    """Bases of the factors as they are, by one float64 Gram matrix of each: first step, or a change from outside.

    keep_moments: moments stay in the basis nearest to the old one, which is right for factors that were changed by
        little or by a scalar; False lets them transport to 0. reduce: as in lora_rite_step_.
    """
    terms = terms_of(options)
    before, pending = group.whiten.clone(), group.transport.clone()
    exact_grams = stages.gram(group.factors, group.wide, impl=impl)
    exact_grams = exact_grams if reduce is None else reduce(group, exact_grams)
    sizes = exact_grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    group.exact.fill_(1)
    stages.rebase_(group, Products(exact_grams, torch.zeros_like(exact_grams), sizes), None, terms.tolerance, impl)
    if keep_moments:
        near = before.mT @ exact_grams @ before
        values, Q = torch.linalg.eigh(((near + near.mT) / 2).nan_to_num())
        kept = values > stages.plain.EQUILIBRATED * values[:, -1:]
        root = Q * (torch.where(kept, values, 1.0).rsqrt() * kept)[:, None, :] @ Q.mT
        # U_now^T U, with U the orthonormal matrix nearest to X whiten, to which `pending` leads.
        group.transport.copy_(group.whiten.mT @ exact_grams @ before @ root @ pending)


def _rates(lr: Any, group: RiteGroup) -> Tensor:
    """[F] float64."""
    count, device = len(group.factors), group.whiten.device
    if isinstance(lr, Tensor):
        if lr.shape not in ((), (1,), (count,)):
            raise ValueError(f"{OP}: lrs must be numbers or have shape () or ({count},), got {tuple(lr.shape)}")
        if lr.device != device:
            raise ValueError(f"{OP}: lrs must be on {device}, got {lr.device}")
        return lr.double().expand(count).contiguous()
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise TypeError(f"{OP}: lrs must be numbers or tensors, got {type(lr).__name__}")
    return torch.full((count,), float(lr), dtype=torch.float64, device=device)


def _number(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{OP}: {name} must be a tensor, got {type(x).__name__}")
    if x.numel() != 1:
        raise ValueError(f"{OP}: {name} must hold one number, got shape {tuple(x.shape)}")
    return x
