"""laurel_residual: the learned residual of every LAuReL variant, with the RMSNorm behind it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.laurel import checks
from effkern.ops.laurel import schema as schema
from effkern.ops.laurel.autograd import Options, apply


class LaurelOutput(NamedTuple):
    """See laurel_residual."""

    y: Tensor
    normed: Tensor | None
    """None without norm_weight."""
    ahead: Tensor | None
    """x times the columns of down that this layer does not use; None where it uses all."""


def laurel_residual(
    branch: Tensor,
    x: Tensor,
    *,
    weights: Tensor | None = None,
    scalar_map: str = "softmax2",
    scale: float = 1.0,
    down: Tensor | None = None,
    up: Tensor | None = None,
    past: Tensor | None = None,
    low_rank_norm: Tensor | None = None,
    low_rank_eps: float = 1e-6,
    addends: Sequence[Tensor] = (),
    addend_weights: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    save_branch: bool | None = None,
    impl: str = "auto",
) -> LaurelOutput:
    """The residual of a block, its branch and its input joined by learned scalars and a low-rank map.

    y = scale (alpha f + beta (x + v B) + sum_j c_j e_j),  v = [x A_own | past],  ahead = x A_rest
    normed = y (mean(y^2) + norm_eps)^-1/2 norm_weight, of y as rounded to its dtype
    with `low_rank_norm` w: v B is replaced by RMSNorm_w(v B) (at B = 0 its slope is low_rank_eps^-1/2)

    alpha, beta from `weights` w by `scalar_map`: "softmax2" 2 softmax(w), a plain residual at w = 0; "softmax";
    "sigmoid1" (s(w), 1 - s(w)); "sigmoid" 2 s(w) each; "none" w itself. Without weights alpha = beta = 1.
    RW is weights alone, LR down and up alone. Previous activations: PA-id passes them as addends; a low-rank map of
    each (PA-shared, RW+LR+PA) is linear in x, so that the earlier layer computes x A for later ones too (`ahead`, the
    columns of its `down` beyond its own) and they take it as `past`: r numbers per token instead of D. A factor gamma
    per layer goes into the rows of up. Gemma 3n: scale 2^-1/2, low_rank_norm, addends=(stream,).
    Everything between loads and stores is float32 (float64), sums over tokens for alpha and beta are float64 (within a
    tile of tokens float32 on a GPU); the skinny products take x's dtype with float32 accumulation.

    Args:
        branch: f(x), shape [..., D]; cast to x's dtype. Gets a gradient, like every tensor below.
        x: the block's input, shape [..., D], float32/bfloat16/float16/float64. A strided one is copied.
        weights: raw scalars, float32 (float64), shape [2] or per channel [2, D] ("sigmoid1": [1] or [1, D]).
        scale: constant factor, no unit.
        down: A, shape [D, S], any floating dtype; S >= own rank. up: B, shape [R, D]; R = own rank + past's columns.
        past: `ahead` of earlier layers for this very batch, shape [..., P], P <= R; cast to x's dtype.
        low_rank_norm: shape [D].
        addends: tensors like x: x0, previous activations. addend_weights: c, float32 (float64), shape [M] or [M, D];
            None: 1 each.
        norm_weight: shape [D], used as it is (no 1 + w).
        save_branch: keep f for backward. None: only for scalar_map="none", whose alpha may reach 0. Otherwise alpha's
            gradient is found from y, which divides by alpha: |alpha| >= 1e-3 is asked for (looked at on the CPU).
        impl: "auto", "cpp", "triton" (CUDA) or "reference".

    Returns:
        LaurelOutput(y, normed | None, ahead | None), in x's dtype.

    Raises:
        ValueError: a shape, device or number breaks a rule, alpha is near 0 with save_branch=False.
        TypeError: unsupported dtype; scalars in half precision.
        NotImplementedError: impl does not cover the device, dtype, rank or number of addends; a second derivative.

    Memory: kept for backward: x, y (the next block's input), x A (S per token), rstd (1 per token), and not f.
    Deterministic for a given number of threads, backward too. low_rank_norm takes the size of v B from B B^T and loses
    digits where rows of up nearly cancel (Triton does not).
    Source: Menghani et al., arXiv 2411.07501; Gemma 3n. Backward without f and look-ahead products: own derivation.
    """
    checks.check_types(
        addends, scale, branch=branch, x=x, weights=weights, down=down, up=up, past=past, low_rank_norm=low_rank_norm,
        addend_weights=addend_weights, norm_weight=norm_weight,
    )  # fmt: skip
    checks.check_stream(branch, x)
    dim = x.shape[-1]
    checks.check_weights(weights, scalar_map, dim, x)
    checks.check_low_rank(down, up, past, low_rank_norm, x)
    checks.check_addends(addends, addend_weights, x)
    checks.check_norm(norm_weight, norm_eps, low_rank_eps, x)
    if save_branch is None:
        save_branch = weights is not None and scalar_map == "none"
    elif not save_branch and weights is not None and torch.is_grad_enabled():
        checks.check_alpha(weights, scalar_map)
    options = Options(
        scalar_map,
        float(scale),
        float(low_rank_eps),
        float(norm_eps),
        choose(impl, x, up, addends),
        bool(save_branch),
    )
    y, normed, own = apply(
        options, _rows(branch.to(x.dtype)), _rows(x), _packed(weights), down, up,
        None if past is None else _rows(past.to(x.dtype)), _packed(low_rank_norm), _packed(addend_weights),
        _packed(norm_weight), *(_rows(e) for e in addends),
    )  # fmt: skip
    ahead = None
    if down is not None:
        used = 0 if up is None else up.shape[0] - (0 if past is None else past.shape[-1])
        if used < down.shape[1]:
            ahead = own[:, used:].reshape(*x.shape[:-1], down.shape[1] - used)
    return LaurelOutput(_like(y, x), None if norm_weight is None else _like(normed, x), ahead)


# Views of the same shape are left out, as each costs microseconds, twice with autograd.
def _rows(x: Tensor) -> Tensor:
    return (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()


def _like(y: Tensor, x: Tensor) -> Tensor:
    return y if x.dim() == 2 else y.view(x.shape)


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def choose(impl: str, x: Tensor, up: Tensor | None, addends: Sequence[Tensor]) -> str:
    """The implementation of a call; a CPU tensor goes to Triton's interpreter only where that is asked for."""
    name = registry.choose(checks.OP, impl, x.device)
    if impl == "auto" and name == "triton" and x.device.type == "cpu":
        return "reference"
    rule = checks.not_covered(name, x, up, addends)
    if rule is not None:
        if impl != "auto":
            raise NotImplementedError(f"{checks.OP}: impl={impl!r} takes {rule}")
        return "reference"
    return name
