"""loop_similarity: the looping regulariser, all parameter groups in one pass."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.loop_similarity import reference
from effkern.ops.loop_similarity import schema as schema

OP = "loop_similarity"


class LoopSimilarity(NamedTuple):
    """See loop_similarity."""

    mean: Tensor
    """What is subtracted from the loss, times a factor."""
    groups: Tensor
    """R of each group, in the order of `groups`."""


def loop_similarity(
    groups: Mapping[str, Sequence[Tensor]] | Sequence[Sequence[Tensor]], block: int, *, impl: str = "auto"
) -> LoopSimilarity:
    """Mean cosine between the layers of adjacent blocks of an unlooped model, which pulls it towards a looped one.

    R_G = 1/(L - k) sum_{i=0}^{L/k-2} sum_{j=0}^{k-1} cos(theta_G^(ik+j), theta_G^((i+1)k+j)),  mean = mean_G R_G

    with theta_G^(l) the parameter G (queries, keys, ..., second matrix of the FFN) of layer l as one vector.
    L - k pairs are summed, so that R_G is in [-1, 1] and 1 for a looped model. The loss is `task - weight *
    result.mean`: the paper prints a plus, by which blocks would move apart; its end cosines of 0.98 show what is meant.

    Products and sums of squares are float32 (float64), their sums over more than some thousand elements float64.
    A cosine with a tensor of zeros (no square of an element above the least float32) is 0 and moves neither tensor.

    Args:
        groups: for each parameter G its L tensors, layer after layer, of one shape, dtype (float32/bfloat16/float16/
            float64) and device. Groups may differ in all but the device. A strided tensor is copied. All get gradients.
        block: k, layers of a block; each L is a multiple of it, and 2 k at least.
        impl: "auto", "cpp" (float32, bfloat16), "triton" (CUDA) or "reference".

    Returns:
        LoopSimilarity(mean, groups): 0-d and [G], float32 (float64). Both have gradients.

    Raises:
        ValueError: no groups, a wrong number of layers, shapes or devices that differ.
        TypeError: no tensor, or its dtype; block is no int.
        NotImplementedError: impl does not cover a device or dtype; a second derivative ("reference" has one).

    Memory: besides the gradients nothing of a tensor's size. Each tensor is read once, though it is in two pairs.
    Deterministic. On CUDA addresses go to the device with each call: not for capture in a CUDA graph.
    Source: Saunshi et al., arXiv 2502.17416, section on looping-inspired regularisation. Backward: own derivation.
    """
    named = _named(groups)
    if isinstance(block, bool) or not isinstance(block, int):
        raise TypeError(f"{OP}: block must be an int, got {type(block).__name__}")
    if block < 1:
        raise ValueError(f"{OP}: block must be at least 1, got {block}")
    first: Tensor | None = None
    for name, tensors in named:
        first = _check(name, tensors, block, first)
    flat = [t for _, tensors in named for t in tensors]
    layers = [len(tensors) for _, tensors in named]
    chosen = _choose(impl, flat)
    if chosen == "reference":
        values = reference.loop_similarity(flat, layers, block)
    else:
        values = _Similarity.apply(chosen, tuple(layers), block, *(t.contiguous() for t in flat))
    return LoopSimilarity(values.mean(), values)


def _named(groups: Any) -> list[tuple[str, Sequence[Tensor]]]:
    if isinstance(groups, Mapping):
        named = [(f"groups[{name!r}]", tensors) for name, tensors in groups.items()]
    elif isinstance(groups, (list, tuple)):
        named = [(f"groups[{i}]", tensors) for i, tensors in enumerate(groups)]
    else:
        raise TypeError(f"{OP}: groups must be a mapping or a sequence of sequences, got {type(groups).__name__}")
    if not named:
        raise ValueError(f"{OP}: groups must hold at least one group, got none")
    return named


def _check(name: str, tensors: Any, block: int, first: Tensor | None) -> Tensor | None:
    """`first`: the first tensor of all groups, which is returned; None in the first group."""
    if not isinstance(tensors, (list, tuple, torch.nn.ParameterList)):
        raise TypeError(f"{OP}: {name} must be a sequence of tensors, got {type(tensors).__name__}")
    count = len(tensors)
    if count % block or count < 2 * block:
        rule = f"hold a multiple of block={block} layers, two blocks at least"
        raise ValueError(f"{OP}: {name} must {rule}, got {count}")
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{OP}: {name}[{i}] must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{OP}: {name}[{i}] must be of a floating dtype, got {t.dtype}")
        if t.dtype != tensors[0].dtype:
            raise TypeError(f"{OP}: {name}[{i}] must have the dtype of {name}[0], {tensors[0].dtype}, got {t.dtype}")
        if t.shape != tensors[0].shape:
            rule = f"have the shape of {name}[0], {tuple(tensors[0].shape)}"
            raise ValueError(f"{OP}: {name}[{i}] must {rule}, got {tuple(t.shape)}")
        first = t if first is None else first
        if t.device != first.device:
            raise ValueError(f"{OP}: {name}[{i}] must be on {first.device}, got {t.device}")
    return first


def _choose(impl: str, tensors: Sequence[Tensor]) -> str:
    device = tensors[0].device
    name = registry.choose(OP, impl, device)
    if impl == "auto" and name == "triton" and device.type == "cpu":
        return "reference"
    taken = {"cpp": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}
    for t in tensors:
        if name in taken and t.dtype not in taken[name]:
            if impl != "auto":
                kinds = ", ".join(str(kind).removeprefix("torch.") for kind in taken[name])
                raise NotImplementedError(f"{OP}: impl={impl!r} takes {kinds}, got {t.dtype}")
            return "reference"
    return name


class _Similarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, impl: str, layers: tuple[int, ...], block: int, *tensors: Tensor) -> Tensor:
        ops = torch.ops.effkern
        operator = ops.loop_similarity_fwd if impl == "cpp" else ops.loop_similarity_triton_fwd
        values, factors = operator(tensors, layers, block)
        ctx.impl, ctx.layers, ctx.block = impl, layers, block
        ctx.save_for_backward(factors, *tensors)
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(f"{OP}: create_graph=True is covered by impl='reference' alone")
        factors, *tensors = ctx.saved_tensors
        ops = torch.ops.effkern
        operator = ops.loop_similarity_bwd if ctx.impl == "cpp" else ops.loop_similarity_triton_bwd
        wanted = ctx.needs_input_grad[3:]
        (grad_values,) = grad_outputs
        grads = operator(
            tensors, factors, grad_values.float().contiguous(), ctx.layers, ctx.block, [int(w) for w in wanted]
        )  # fmt: skip
        return None, None, None, *(g if w else None for g, w in zip(grads, wanted))
