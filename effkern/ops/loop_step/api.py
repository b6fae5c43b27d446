"""loop_step: what lies between two loops of a looped block, in one pass."""

from typing import NamedTuple

from torch import Tensor

from effkern.ops import registry
from effkern.ops.loop_step import checks, reference
from effkern.ops.loop_step import schema as schema
from effkern.ops.loop_step.autograd import Options, apply, fitted
from effkern.ops.loop_step.terms import Factor, Terms


class LoopStepOutput(NamedTuple):
    """See loop_step."""

    state: Tensor
    core_input: Tensor
    """`state` itself where no term is added to it."""
    change: Tensor | None
    """None without return_change."""


def loop_step(
    f: Tensor,
    h: Tensor,
    e: Tensor | None = None,
    *,
    alpha: Factor | None = None,
    beta: Factor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    norm_weight: Tensor | None = None,
    norm: bool = False,
    eps: float = 1e-6,
    state_scale: Factor | None = None,
    input_scale: Factor | None = None,
    embedding: Tensor | None = None,
    return_change: bool = False,
    save_branch: bool | None = None,
    impl: str = "auto",
) -> LoopStepOutput:
    """The new state of a looped block from its core's output, and what the core reads next.

    s~ = alpha f + beta h + (h A) B
    s = s~ (mean(s~^2) + eps)^-1/2 norm_weight  with `norm` or `norm_weight`, else s~
    x = state_scale s + input_scale e + embedding     s is f itself, and x is s itself, where no term changes them
    change = ||s - h|| / ||s|| per token, and 0 where s = h

    The damped (Euler) form h + (F(h) - h) / K is alpha = 1/K, beta = 1 - 1/K. An injection W [h; e] is W1 h + W2 e:
    W2 e is the same in every loop and enters as `e`, W1 is a product of its own. x and the change are made of s as
    rounded to its dtype. Between loads and stores all is float32 (float64); sums over tokens are float32 over some rows
    and float64 beyond; the products of A and B take h's dtype with float32 accumulation.

    Args:
        f: F(x), the core's output, shape [..., D]; cast to h's dtype. Gets a gradient, like every tensor below.
        h: the state before, shape [..., D], float32/bfloat16/float16/float64. A strided one is copied.
        e: the injected input, like h; cast to its dtype. None: the term is absent.
        alpha, beta, state_scale, input_scale: a number, or a tensor of any floating dtype, shape [], [1] or [D].
            None: 1, for beta 0. beta as the number 0 is no term at all.
        low_rank: (A [D, r], B [r, D]), any floating dtype and layout.
        norm_weight: shape [D], used as it is (no 1 + w). norm: normalise, also without a weight.
        embedding: shape [D]: of the loop, or of its time.
        return_change: also the change, which has no gradient.
        save_branch: keep f and h for the norm's backward. Otherwise it is found from s, which divides by norm_weight.
            None: where that may be, which is looked at on the CPU outside of torch.compile; elsewhere they are kept.
        impl: "auto", "cpp", "triton" (CUDA) or "reference".

    Returns:
        LoopStepOutput(state, core_input, change | None), like h; the change [...] in float32 (float64).

    Raises:
        ValueError: a shape, device or number breaks a rule; input_scale without e; norm_weight near 0 with
            save_branch=False.
        TypeError: unsupported dtype or type.
        NotImplementedError: impl does not cover the device or dtype; a second derivative ("reference" has one).

    Range: squares are summed in float32 (float64) as they are, as in any RMSNorm. Those of numbers below 1e-19 (1e-154)
    lose digits and then vanish: the change is 0 where s and s - h are as small. Sums of squares above 1e38 (1e308), as
    of numbers of 1e18 to 1e19 (1e153 to 1e154), are infinite: the normalised state is 0, the change NaN or infinite.

    Memory: kept for backward: nothing wide without norm and tensors as factors; with a norm s and 1 per token; f for
    alpha's gradient, h for beta's and A's, s and e for those of their scales; h A (r per token).
    Deterministic, backward too.
    Source: the terms of looped models (arXiv 2502.17416, 2502.05171, 2510.25741, 2411.07501). Backward: own derivation.
    """
    checks.check_streams(f, h, e)
    if input_scale is not None and e is None:
        raise ValueError(f"{checks.OP}: input_scale must come with e, got e=None")
    alpha, beta = 1.0 if alpha is None else alpha, 0.0 if beta is None else beta
    state_scale, input_scale = 1.0 if state_scale is None else state_scale, 1.0 if input_scale is None else input_scale
    for name, factor in (("alpha", alpha), ("beta", beta), ("state_scale", state_scale), ("input_scale", input_scale)):
        checks.check_factor(name, factor, h)
    checks.check_low_rank(low_rank, h)
    checks.check_vector("norm_weight", norm_weight, h)
    checks.check_vector("embedding", embedding, h)
    checks.check_eps(eps)
    down, up = (None, None) if low_rank is None else low_rank
    norm = norm or norm_weight is not None
    name = choose(impl, h)
    terms = Terms(
        alpha, beta, state_scale, input_scale, down, up, norm_weight, embedding, norm, eps, e is not None, return_change
    )  # fmt: skip
    if name == "reference":
        return LoopStepOutput(*reference.loop_step(f.to(h.dtype), h, None if e is None else e.to(h.dtype), terms))
    factors = (alpha, beta, state_scale, input_scale)
    numbers = tuple(1.0 if isinstance(x, Tensor) else float(x) for x in factors)
    assert len(numbers) == 4
    branch = checks.keeps_branch(save_branch, norm, norm_weight, h)
    options = Options(
        name, numbers, norm, float(eps), return_change, branch, terms.keeps_f, terms.has_core_input
    )  # fmt: skip
    f = fitted(f, h.dtype)
    if terms.keeps_f and not terms.has_core_input and not return_change:
        return LoopStepOutput(f, f, None)
    state, core_input, moved = apply(
        options, f, fitted(h, h.dtype), None if e is None else fitted(e, h.dtype),
        *(x if isinstance(x, Tensor) else None for x in factors), down, up, norm_weight, embedding,
    )  # fmt: skip
    state = f if terms.keeps_f else state
    return LoopStepOutput(
        state, core_input if terms.has_core_input else state, moved.view(h.shape[:-1]) if return_change else None
    )


def choose(impl: str, h: Tensor) -> str:
    """The implementation of a call; a CPU tensor goes to Triton's interpreter only where that is asked for."""
    name = registry.choose(checks.OP, impl, h.device)
    if impl == "auto" and name == "triton" and h.device.type == "cpu":
        return "reference"
    rule = checks.not_covered(name, h)
    if rule is not None:
        if impl != "auto":
            raise NotImplementedError(f"{checks.OP}: impl={impl!r} takes {rule}")
        return "reference"
    return name
