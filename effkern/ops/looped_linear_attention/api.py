"""looped_linear_attention: all loops of the restricted model of in-context regression in one kernel."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.looped_linear_attention import checks
from effkern.ops.looped_linear_attention import schema as schema
from effkern.ops.looped_linear_attention.autograd import Options, apply
from effkern.ops.looped_linear_attention.problem import cheapest


class LoopedAttentionOutput(NamedTuple):
    """See looped_linear_attention."""

    prediction: Tensor
    per_loop: Tensor | None
    """None without every_loop."""


def looped_linear_attention(
    x: Tensor,
    y: Tensor,
    query: Tensor,
    preconditioner: Tensor,
    loops: int,
    *,
    step_sizes: Tensor | None = None,
    every_loop: bool = False,
    form: str = "auto",
    impl: str = "auto",
) -> LoopedAttentionOutput:
    """Linear regression in context: linear attention applied `loops` times to a prompt of examples and a query.

    Z_0 = [[x_1 .. x_n, q], [y_1 .. y_n, 0]],  Z <- Z - (e_l / n) P Z M (Z^T Q_l Z),  Q_l = diag(A_l, 0)

    P keeps the last row, M leaves the query out, and the prediction is minus the last entry of the query's column. A
    layer is then a preconditioned step of gradient descent, w <- w + (e_l / n) A_l^T X^T (y - X w) from w = 0, with
    prediction w . q; A need not be symmetric. Nothing but the last row changes, so that the state of a problem is w,
    d numbers, or as many as there are examples (problem.py). All loops run with it in registers or the nearest
    cache.

    Three forms, equal in real numbers, differ in what they multiply per loop: "factors" S = X^T X / n and A_l (2 d^2),
    "primal" A^T S (d^2), "dual" X A^T X^T / n (n^2). "auto" counts multiply-adds: one A per loop takes factors; one A
    for all takes dual where examples are few (n well below d), else primal if loops > d, else factors. Roundings: each
    loop adds at most one of the size of X^T y / n. With fewer examples than features factors and primal keep those of
    all loops; dual works them off. Once the loops have converged the gradient of A is near 0; factors then gives more
    of its digits than the other two, which take it as a difference.

    Args:
        x: examples, shape [..., n, d], float32/float64/bfloat16/float16. Gets a gradient, like every tensor here.
        y: targets, shape [..., n], dtype of x. query: shape [..., d] or, for m queries, [..., m, d], dtype of x.
            Leading dimensions are separate problems; strided inputs are copied.
        preconditioner: A, shape [d, d] for all loops (looped), or [loops, d, d] (free); any floating dtype.
        step_sizes: e, shape [loops]; None: 1 each.
        every_loop: also return the prediction after each loop.
        form: "auto", "factors", "primal" or "dual".
        impl: "auto", "cpp", "triton" (CUDA; d and m up to 32, 1024 loops; dual up to n = 16) or "reference" (PyTorch).

    Returns:
        LoopedAttentionOutput(prediction [...] or [..., m], per_loop [loops, ...] with the last one equal to
        prediction | None), float32, for float64 inputs float64: half precision is widened on entry, and the state is
        never rounded to it.

    Raises:
        ValueError: a shape, device or number breaks a rule.
        TypeError: unsupported dtype, y or query of another dtype than x.
        NotImplementedError: impl does not cover the device, dtype or sizes; a second derivative.

    Memory: backward keeps the inputs and nothing per loop; it runs the loops again with the states of 32 to 64 loops
    at a time on chip, and does not invert the iteration, which would be exact in real numbers only. C++: some d^2
    numbers for each of up to 16 problems per thread. Problems do not mix: a NaN stays in its problem, but for the
    gradients of the shared preconditioner and step_sizes. Deterministic, on the CPU for any number of threads.
    Source: Gatmiry et al., arXiv 2410.21698; the model of arXiv 2410.08292. Forms and gradients: own derivation.
    """
    checks.check_types(step_sizes, loops, x=x, y=y, query=query, preconditioner=preconditioner)
    checks.check_shapes(x, y, query)
    examples, dim = x.shape[-2:]
    checks.check_parameters(preconditioner, step_sizes, dim, loops)
    shared, single = preconditioner.dim() == 2, query.dim() < x.dim()
    checks.check_form(form, shared)
    queries = 1 if single else query.shape[-2]
    if form == "auto":
        form = cheapest(examples, dim, queries, loops, shared)
    state = examples if form == "dual" else dim
    options = Options(loops, bool(every_loop), form, _choose(impl, state, dim, queries, loops, x))
    batch = math.prod(x.shape[:-2])
    wide = torch.promote_types(x.dtype, torch.float32)
    predictions = apply(
        options,
        x.to(wide).reshape(batch, examples, dim).contiguous(),
        y.to(wide).reshape(batch, examples).contiguous(),
        query.to(wide).reshape(batch, queries, dim).contiguous(),
        preconditioner.to(wide).reshape(1 if shared else loops, dim, dim).contiguous(),
        None if step_sizes is None else step_sizes.to(wide).contiguous(),
    )
    leading = x.shape[:-2] if single else (*x.shape[:-2], queries)
    return LoopedAttentionOutput(
        predictions[-1].reshape(leading), predictions.reshape(loops, *leading) if every_loop else None
    )


def _choose(impl: str, state: int, dim: int, queries: int, loops: int, x: Tensor) -> str:
    """The implementation of a call; a CPU tensor goes to Triton's interpreter only where that is asked for."""
    name = registry.choose(checks.OP, impl, x.device)
    if impl == "auto" and name == "triton" and x.device.type == "cpu":
        return "reference"
    rule = checks.not_covered(name, state, dim, queries, loops, x.dtype)
    if rule is None:
        return name
    if impl != "auto":
        raise NotImplementedError(f"{checks.OP}: impl={impl!r} takes {rule}")
    return "reference"
