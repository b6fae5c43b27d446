"""apply_: momentum, the two products with the roots, the update's norm, decay and the new weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.ops.shampoo import checks, reference
from effkern.ops.shampoo import schema as schema
from effkern.ops.shampoo.gram import choose

OP = "shampoo_apply_"


def apply_(
    weights: Sequence[Tensor] | Tensor,
    grads: Sequence[Tensor] | Tensor,
    left_Bmm: Tensor | None = None,
    right_Bnn: Tensor | None = None,
    *,
    lr: float | Tensor,
    momenta: Sequence[Tensor] | Tensor | None = None,
    momentum_decay: float = 0.0,
    momentum_weight: float = 1.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    norm: float | Tensor | None = None,
    failures: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """One update of B blocks in place; returns the norm of each U.

    M <- momentum_decay M + momentum_weight G
    D = momentum_decay M + momentum_weight G with `nesterov`, M otherwise, G without `momenta`
    U = L D R                                   a root that is None is left out
    s = norm / |U|_F with `norm`, else 1        grafting: the length of another method's step; 0 where U = 0
    W <- (1 - lr weight_decay) W - lr s U

    Between loads and stores all is float32 (float64). A block whose G or U has a norm that is not finite is left as it
    is, weights and momentum, its norm comes back as NaN and failures[b] += 1; for the others failures[b] = 0.

    Args:
        weights: B matrices [m, n] of one shape, as a list or as one [B, m, n]; float32/bfloat16/float16/float64, any
            strides. Written.
        grads: like weights; of the same or another of these dtypes.
        left_Bmm, right_Bnn: roots, contiguous, float32 (float64 for float64 weights), or None. Taken as symmetric.
        lr: a number or a tensor of one number, which is read on the device.
        momenta: like weights, any of these dtypes, or None: no momentum. Written.
        weight_decay: decoupled, >= 0.
        norm: the length of s U: a number > 0, or a float32 tensor [B], or None.
        failures: int32 [B] or None. Written.
        impl: "auto", "cpp", "triton" (CUDA) or "reference".

    Returns:
        |U|_F, float32 [B]; NaN for blocks left as they are.

    Raises:
        ValueError: shapes, devices or numbers break a rule.
        TypeError: wrong dtype or type.
        NotImplementedError: impl does not cover the device or dtype.

    Memory: on the CPU three blocks per thread; on CUDA one batch of D and of U. Deterministic.
    Source: AdamW-style Shampoo (arXiv 2601.07326) with free exponents; norm matching as in ASGO (arXiv 2503.20762).
    """
    w, g = checks.blocks(OP, "weights", weights), checks.blocks(OP, "grads", grads)
    checks.same_blocks(OP, "grads", g, "weights", w)
    m = None if momenta is None else checks.blocks(OP, "momenta", momenta)
    if m is not None:
        checks.same_blocks(OP, "momenta", m, "weights", w)
    elif nesterov:
        raise ValueError(f"{OP}: nesterov must come with momenta, got momenta=None")
    batch = len(w)
    like = w[0] if w else weights if isinstance(weights, Tensor) else torch.empty(0)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    for name, root, side in (("left_Bmm", left_Bmm, 0), ("right_Bnn", right_Bnn, 1)):
        if root is None:
            continue
        checks.square(OP, name, root, (dtype,))
        if root.shape[0] != batch or (w and root.shape[1] != w[0].shape[side]):
            want = (batch, *(2 * (w[0].shape[side],) if w else ("p", "p")))
            raise ValueError(f"{OP}: {name} must have shape {want}, got {tuple(root.shape)}")
        checks.same_device(OP, name, root, like)
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"{OP}: lr must hold one floating-point number, got {lr.dtype} {tuple(lr.shape)}")
    else:
        lr = checks.number(OP, "lr", lr, 0.0, "finite and >= 0")
    for label, value in (("momentum_decay", momentum_decay), ("momentum_weight", momentum_weight)):
        checks.number(OP, label, value, 0.0, "finite and >= 0")
    checks.number(OP, "weight_decay", weight_decay, 0.0, "finite and >= 0")
    if isinstance(norm, Tensor):
        if norm.dtype != torch.float32 or norm.shape != (batch,):
            raise ValueError(f"{OP}: norm must be float32 of shape ({batch},), got {norm.dtype} {tuple(norm.shape)}")
        checks.same_device(OP, "norm", norm, like)
    elif norm is not None:
        norm = checks.number(OP, "norm", norm, 0.0, "finite and > 0", open_end=True)
    checks.counters(OP, failures, batch, like)
    name = choose(OP, impl, like)
    if not w:
        return like.new_empty(0, dtype=torch.float32)
    lengths = norm if isinstance(norm, Tensor) else None
    length = norm if isinstance(norm, float) else 0.0
    rates = lr.reshape(()).to(like.device, torch.float64) if isinstance(lr, Tensor) else None
    rate = 0.0 if isinstance(lr, Tensor) else lr
    arguments = (
        w, m or [], g, left_Bmm, right_Bnn, float(momentum_decay), float(momentum_weight), nesterov, rate, rates,
        float(weight_decay), length, lengths, failures,
    )  # fmt: skip
    if name == "reference":
        return reference.apply_(*arguments)
    ops = torch.ops.effkern
    return (ops.shampoo_apply_ if name == "cpp" else ops.shampoo_triton_apply_)(*arguments)
