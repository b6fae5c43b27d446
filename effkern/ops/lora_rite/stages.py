"""The four stages of a step, each on the implementation that is asked for; for other optimizers of LoRA factors too.

    gram           K1  (X W)^T (X W) of many tall tensors
    precondition_  K2  everything r x r of LoRA-RITE
    update_        K3  M <- M carry + G take, X <- shrink X - M apply, and the products that the next basis needs
    rebase_        K4  the basis of each factor as it is now

A process that holds some of the rows adds up what gram and update_ return over all processes, and goes on.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effkern import native
from effkern.ops import registry
from effkern.ops.lora_rite import plain
from effkern.ops.lora_rite import schema as schema
from effkern.ops.lora_rite.group import OP, RiteGroup
from effkern.ops.lora_rite.terms import Terms

Reduce = Callable[[RiteGroup, Tensor], Tensor]
CUDA_RANK = 128
"""Largest rank of the r x r kernels on CUDA; above it they are plain, with torch's eigensolver."""
TRITON_RANK = 16
"""Largest rank of the Triton kernels; above it "auto" means plain products on CUDA."""


class Update(NamedTuple):
    """What a factor's update takes; float64, matrices [F, r, r]."""

    gate: Tensor
    """0-d float64: where it is not finite nothing is written."""
    carry: Tensor
    take: Tensor
    apply: Tensor
    shrink: Tensor
    """[F]."""


class Products(NamedTuple):
    """float64; y and u are X whiten after and before the update, or X itself where the group's `exact` says so."""

    grams: Tensor
    """y^T y, [F, r, r]."""
    crosses: Tensor
    """y^T u, [F, r, r]."""
    sizes: Tensor
    """Square of X's norm, [F]."""


def choose(impl: str, like: Tensor, rank: int) -> str:
    """The implementation for tensors like this one; "plain" runs on any device and dtype."""
    name = registry.choose(OP, impl, like.device)
    if impl == "auto" and name == "triton" and rank > TRITON_RANK:
        return "plain"
    if like.dtype == torch.float32 and not (impl == "auto" and name == "triton" and like.device.type == "cpu"):
        return name
    if impl not in ("auto", "plain"):
        raise NotImplementedError(f"{OP}: impl={impl!r} takes float32 factors, got {like.dtype}")
    return "plain"


def small_compiled(impl: str, like: Tensor, rank: int) -> bool:
    """Whether the r x r stages run compiled; impl="triton" without the compiled module takes their plain form."""
    if impl == "plain" or like.dtype != torch.float32:
        return False
    choose(impl, like, rank)
    if like.device.type == "cuda" and rank > CUDA_RANK:
        return False
    return native.load("_C_cuda" if like.device.type == "cuda" else "_C") is None


def gram(
    tensors: Sequence[Tensor], wide: Sequence[bool], whiten: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """(X W)^T (X W) of each tall matrix, [F, r, r] float64.

    Args:
        tensors: contiguous, of one dtype (float32/float64) and device; [rows, r], or [r, rows] where `wide` says so.
        whiten: W of each, [F, r, r] float64: X W is made in X's dtype, sums of products are float64 over tiles. None:
            X^T X with every product in float64, exact enough for X of condition 1e7.

    Memory: F r^2, and a tile per thread; the CUDA kernels' partial sums. Deterministic, whatever the threads.
    """
    chosen = choose(impl, tensors[0], tensors[0].shape[0 if wide[0] else 1])
    if chosen == "cpp":
        return torch.ops.effkern.lora_rite_gram(list(tensors), list(wide), whiten)
    if chosen == "triton":
        from effkern.ops.lora_rite import triton

        return triton.gram(tensors, wide, whiten)
    return plain.gram(tensors, wide, whiten)


def precondition_(
    group: RiteGroup, grams: Tensor, all_traces: Tensor, lr: Tensor, grad_scale: Tensor | None, terms: Terms, impl: str
) -> Update:
    """r x r stage of LoRA-RITE for one group: second moments, bases and steps go on; what `update_` takes comes back.

    Args:
        grams: of the unmagnified gradients, [F, r, r], already times grad_scale^2.
        all_traces: squared norms of all factors of all groups (`traces`): what clipping looks at.
        lr: [F] float64.
    """
    like = group.factors[0]
    state = (group.whiten, group.second, group.transport, group.escaped, group.steps)
    if not small_compiled(impl, like, group.rank):
        return Update(
            *plain.precondition_(grams, all_traces, group.rows, lr, grad_scale, *state, terms)
        )  # fmt: skip
    return Update(*torch.ops.effkern.lora_rite_precondition_(
        grams, all_traces, group.rows, lr, grad_scale, *state, list(terms[:7]), list(terms[7:])
    ))  # fmt: skip


def update_(
    factors: Sequence[Tensor], moments: Sequence[Tensor], grads: Sequence[Tensor], wide: Sequence[bool],
    update: Update, whiten: Tensor, exact: Tensor, *, impl: str = "auto",
) -> Products:  # fmt: skip
    """M <- M carry + G take and X <- shrink X - M apply for each factor, in one pass over X, M and G."""
    arguments = (*update, whiten, exact)
    chosen = choose(impl, factors[0], whiten.shape[-1])
    if chosen == "cpp":
        lists = (list(factors), list(moments), list(grads), list(wide))
        return Products(*torch.ops.effkern.lora_rite_update_(*lists, *arguments))
    if chosen == "triton":
        from effkern.ops.lora_rite import triton

        return Products(*triton.update_(factors, moments, grads, wide, *arguments))
    return Products(*plain.update_(factors, moments, grads, wide, *arguments))


def rebase_(group: RiteGroup, products: Products, gate: Tensor | None, tolerance: float, impl: str = "auto") -> None:
    """whiten, transport and exact of the factors as they are now."""
    single = group.factors[0].dtype == torch.float32
    arguments = (*products, gate, group.whiten, group.transport, group.exact, single, tolerance)
    if small_compiled(impl, group.factors[0], group.rank):
        torch.ops.effkern.lora_rite_rebase_(*arguments)
    else:
        plain.rebase_(*arguments)


def unmagnified(
    group: RiteGroup,
    grads: Sequence[Tensor],
    skip_rms: float,
    grad_scale: Tensor | None = None,
    reduce: Reduce | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gram matrices of the gradients unmagnified by the other factors' bases, and `traces` of them."""
    if choose(impl, group.factors[0], group.rank) == "triton" and grad_scale is None and reduce is None:
        from effkern.ops.lora_rite import triton

        found = triton.unmagnified(grads, group.wide, group.whiten, group.rows, skip_rms)
        if found is not None:
            return found
    h = gram(grads, group.wide, plain.other(group.whiten), impl=impl)
    h = h if reduce is None else reduce(group, h)
    h = h if grad_scale is None else h * grad_scale.square()
    return h, traces(group, h, skip_rms)


def traces(group: RiteGroup, grams: Tensor, skip_rms: float) -> Tensor:
    """[F] squared norms of the unmagnified gradients; 0 for a factor whose root mean square is above `skip_rms` > 0."""
    return plain.traces(grams, group.rows, skip_rms)
