"""gram_ema_: the moving average of a factor of Shampoo, for all blocks of one shape."""

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.shampoo import checks, reference
from effkern.ops.shampoo import schema as schema

OP = "shampoo_gram_ema_"
SIDES = ("left", "right")


def gram_ema_(
    factor_Bpp: Tensor,
    grads: Sequence[Tensor] | Tensor,
    *,
    side: str = "left",
    decay: float,
    weight: float,
    failures: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """L_b <- decay L_b + weight G_b G_b^T in place, for side "right" with G_b^T G_b.

    Sum: decay = weight = 1. EMA: decay = beta, weight = 1 - beta. One triangle is computed and mirrored, so that L
    stays symmetric to the bit; only L's lower triangle is read. Products are summed in float32 (float64).

    A block whose Gram matrix has a diagonal that is not finite is left as it is, and failures[b] += 1; for the others
    failures[b] = 0. NaN or Inf in G cannot miss that diagonal, and a finite G whose squares overflow is seen too.

    Args:
        factor_Bpp: L, [B, p, p], contiguous; float32, or float64 for impl "reference" and "cpp". Written.
        grads: B matrices [m, n] of one shape, as a list or as one [B, m, n], any strides: with p = m on the left and
            p = n on the right. float32, bfloat16, float16, or float64 with a float64 factor. Not written.
        side: "left" or "right".
        decay, weight: finite, >= 0.
        failures: int32 [B] on the device, or None. Written.
        impl: "auto", "cpp", "triton" (CUDA) or "reference".

    Raises:
        ValueError: shapes, devices, side or numbers break a rule.
        TypeError: wrong dtype or type.
        NotImplementedError: impl does not cover the device or dtype.

    Memory: on the CPU one packed matrix per thread; on CUDA one batch of gradients. No host synchronisation, no value
    is looked at. Deterministic.
    Source: Gupta, Koren, Singer 2018 (arXiv 1802.09568); one-sided: Xie et al. (arXiv 2503.10537), Algorithm 2.
    """
    checks.square(OP, "factor_Bpp", factor_Bpp)
    blocks = checks.blocks(OP, "grads", grads)
    if side not in SIDES:
        raise ValueError(f"{OP}: side must be 'left' or 'right', got {side!r}")
    decay = checks.number(OP, "decay", decay, 0.0, "finite and >= 0")
    weight = checks.number(OP, "weight", weight, 0.0, "finite and >= 0")
    batch, p, _ = factor_Bpp.shape
    if len(blocks) != batch:
        raise ValueError(f"{OP}: grads must hold {batch} blocks, as factor_Bpp does, got {len(blocks)}")
    checks.counters(OP, failures, batch, factor_Bpp)
    left = side == "left"
    if blocks:
        if blocks[0].shape[0 if left else 1] != p:
            rule = f"have {p} {'rows' if left else 'columns'} for side={side!r}"
            raise ValueError(f"{OP}: grads must {rule}, got {tuple(blocks[0].shape)}")
        checks.same_device(OP, "grads", blocks[0], factor_Bpp)
        if factor_Bpp.dtype == torch.float32 and blocks[0].dtype == torch.float64:
            raise TypeError(f"{OP}: grads must be float32 or narrower with a float32 factor, got torch.float64")
    name = choose(OP, impl, factor_Bpp)
    if batch == 0 or p == 0:
        return
    if name == "reference":
        reference.gram_ema_(factor_Bpp, blocks, left, decay, weight, failures)
        return
    ops = torch.ops.effkern
    operator = ops.shampoo_gram_ema_ if name == "cpp" else ops.shampoo_triton_gram_ema_
    operator(factor_Bpp, blocks, left, decay, weight, failures)


def choose(op: str, impl: str, like: Tensor) -> str:
    """The implementation of a call; a CPU tensor goes to Triton's interpreter only where that is asked for."""
    name = registry.choose(op, impl, like.device)
    if impl == "auto" and name == "triton" and like.device.type == "cpu":
        return "reference"
    if name == "triton" and like.dtype == torch.float64:
        if impl != "auto":
            raise NotImplementedError(f"{op}: impl='triton' takes float32, got {like.dtype}")
        return "reference"
    return name
