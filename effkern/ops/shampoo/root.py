"""inverse_root: A^-a of a batch of symmetric positive semidefinite matrices."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.ops.shampoo import checks, reference
from effkern.ops.shampoo import schema as schema
from effkern.ops.shampoo.gram import choose
from effkern.ops.shampoo.methods import (
    LEAST_SPLIT_GRAM_RIDGE,
    METHODS,
    POWERS,
    PRECISIONS,
    covers,
    resolve,
    root_of,
)
from effkern.ops.shampoo.rational import terms

OP = "shampoo_inverse_root"
# InverseRoot.status
COMPUTED, FELL_BACK, ZERO, FAILED = 0, 1, 2, 3


class InverseRoot(NamedTuple):
    """See inverse_root."""

    root: Tensor
    residual: Tensor
    """|X^p A v - v| / |v| for a fixed v, [B] float32; 0 where the exponent is not -1/p with p <= 8, or A = 0."""
    status: Tensor
    """int32 [B]: COMPUTED, FELL_BACK (to eigh), ZERO (A = 0) or FAILED."""


def inverse_root(
    factor_Bpp: Tensor,
    *,
    exponent: float = -0.5,
    ridge: float = 1e-6,
    scale: float = 1.0,
    pseudo_inverse: float | None = None,
    method: str = "auto",
    precision: str = "tf32x3",
    residual_bound: float = 0.25,
    out: Tensor | None = None,
    failures: Tensor | None = None,
    impl: str = "auto",
) -> InverseRoot:
    """X_b = (scale (max(A_b, 0) + ridge lambda_max(A_b) I))^exponent, on the eigenvalues, for every block b.

    Methods, each of a fixed number of steps:
      eigh            any exponent. Eigenvalues clamped at 0, then the ridge. float32 matrices in float32 LAPACK, in
                      float64 if that fails or the ridge is below 1e-5, where its roundings would be seen.
      rational        any exponent in (-1, 0). sum_k w_k (A + (ridge + t_k) lambda_max I)^-1 by Cholesky factors: the
                      poles of Zolotarev's best approximation of x^(-1/2) on [ridge, 1], weights for x^exponent. It
                      truncates less than a float32 eigh rounds: rational.tolerance.
      polar_express   -1/2 and -1/4. Coupled (Y, Z) quintic steps, arXiv 2505.16932.
      gram_ns         -1/2. The same polynomials on R alone; needs float32-class products.
      coupled_newton  -1/p.
    "auto": rational where the exponent allows it and ridge >= 1e-7, for Triton polar_express and coupled_newton; else
    eigh, as for a pseudo-inverse. Errors of each: python -m benchmarks.ops.shampoo_precision.

    A block is checked by its residual with a fixed vector v of +-1: |X^p A v - v| <= residual_bound |v|, with A the
    matrix in the parentheses; X applied p times. If that or a step of the method fails, the block is computed by eigh
    (on the CPU). If that fails too, or A is not finite, `out` keeps its old content and failures[b] += 1; else
    failures[b] = 0. A = 0 leaves `out` as it is and is no failure.

    Args:
        factor_Bpp: A, [B, p, p], contiguous, symmetric: only the lower triangle counts. float32 or float64.
        exponent: < 0, for example -1/2, -1/4.
        ridge: >= 0, of the largest eigenvalue (found to some percent where the method does not have it).
        scale: > 0, a factor of A, for example the bias correction 1 / (1 - beta^t).
        pseudo_inverse: eigenvalues up to this part of the largest give 0 instead; needs eigh. None: no.
        precision: of Triton's products: "ieee" (float32 without tensor cores), "tf32x3" (as good) or "bf16x3" (16
            bits; for gram_ns a ridge of at least 1e-5). Elsewhere products are float32 (float64) in any case.
        residual_bound: > 0.
        out: like factor_Bpp, where the roots go. None: new memory; NaN for a block that failed, 0 for A = 0.
        failures: int32 [B] or None. Written.
        impl: "auto", "cpp", "triton" (CUDA; the three iterations) or "reference".

    Returns:
        InverseRoot(root, residual, status); root is `out` if that was given. Symmetric to the bit.

    Raises:
        ValueError: shapes or numbers break a rule, or the method does not cover the exponent.
        TypeError: wrong dtype or type.
        NotImplementedError: impl does not cover the device, dtype or method.

    Memory: on the CPU three matrices per thread, for eigh five, of which two may be float64; iterations keep six
    batches. No host synchronisation but in eigh on CUDA, which is the library's. Deterministic, impl="reference" for
    a given number of threads.

    There is no warm start: a root of the factor before does not commute with the new one, so that Newton's step from it
    diverges and the coupled pair of C converges to C (A C)^(-1/2) (python -m benchmarks.ops.shampoo_precision --warm).
    Source: the methods' own; Zolotarev 1877 as in Hale, Higham, Trefethen 2008 (SIAM J. Numer. Anal. 46).
    """
    checks.square(OP, "factor_Bpp", factor_Bpp)
    exponent = -checks.number(OP, "-exponent", _negated(exponent), 0.0, "finite and > 0", open_end=True)
    ridge = checks.number(OP, "ridge", ridge, 0.0, "finite and >= 0")
    scale = checks.number(OP, "scale", scale, 0.0, "finite and > 0", open_end=True)
    residual_bound = checks.number(OP, "residual_bound", residual_bound, 0.0, "finite and > 0", open_end=True)
    if pseudo_inverse is not None:
        pseudo_inverse = checks.number(OP, "pseudo_inverse", pseudo_inverse, 0.0, "finite and >= 0")
    if method != "auto" and method not in METHODS:
        names = ", ".join(repr(m) for m in ("auto", *METHODS))
        raise ValueError(f"{OP}: method must be one of {names}, got {method!r}")
    batch = factor_Bpp.shape[0]
    if out is not None:
        checks.like(OP, "out", out, "factor_Bpp", factor_Bpp)
    checks.counters(OP, failures, batch, factor_Bpp)
    name = choose(OP, impl, factor_Bpp)
    if name == "triton" and impl == "auto" and (pseudo_inverse is not None or not root_of(exponent)):
        name = "reference"
    chosen = resolve(method, exponent, ridge, pseudo_inverse, name)
    rule = covers(chosen, exponent, ridge, pseudo_inverse)
    if rule is not None:
        raise ValueError(f"{OP}: method={chosen!r} needs {rule}")
    if precision not in PRECISIONS:
        raise ValueError(f"{OP}: precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if name == "triton" and precision == "bf16x3" and chosen == "gram_ns" and ridge < LEAST_SPLIT_GRAM_RIDGE:
        raise ValueError(f"{OP}: ridge must be >= {LEAST_SPLIT_GRAM_RIDGE} for gram_ns in bf16x3, got {ridge!r}")
    if chosen not in POWERS[name]:
        if impl != "auto":
            raise NotImplementedError(f"{OP}: impl={name!r} has {', '.join(POWERS[name])}, got method={chosen!r}")
        name = "reference"
    fresh = out is None
    root = torch.empty_like(factor_Bpp) if out is None else out
    if factor_Bpp.numel() == 0:
        empty = factor_Bpp.new_zeros(batch, dtype=torch.float32)
        return InverseRoot(root, empty, torch.zeros_like(empty, dtype=torch.int32))
    poles, weights = terms(exponent, ridge) if chosen == "rational" else ((), ())
    arguments = (
        root, factor_Bpp, METHODS.index(chosen), exponent, ridge, scale,
        -1.0 if pseudo_inverse is None else pseudo_inverse, list(poles), list(weights), residual_bound, fresh, failures,
    )  # fmt: skip
    if name == "reference":
        return InverseRoot(root, *reference.inverse_root_(*arguments))
    ops = torch.ops.effkern
    if name == "triton":
        return InverseRoot(root, *ops.shampoo_triton_inverse_root_(*arguments, precision))
    return InverseRoot(root, *ops.shampoo_inverse_root_(*arguments))


def _negated(exponent: Any) -> Any:
    return -exponent if isinstance(exponent, (int, float)) and not isinstance(exponent, bool) else exponent


def matrix_inverse_root(
    matrix: Tensor,
    p: float = 2,
    *,
    ridge: float = 1e-6,
    method: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """(max(A, 0) + ridge lambda_max(A) I)^(-1/p) of one or more symmetric positive semidefinite matrices.

    The root that Shampoo uses, for other optimizers. For control over failures and memory see
    effkern.ops.shampoo.inverse_root.

    Args:
        matrix: A, [..., n, n], float32 or float64; float16 and bfloat16 are computed in float32 and rounded. Any
            strides. Only the lower triangle counts. Gets no gradient.
        p: > 0; 2 gives the inverse square root.
        ridge: >= 0, of the largest eigenvalue.
        method, impl: as in inverse_root; "auto" on the CPU is eigh, which keeps the most digits of any spectrum.

    Returns:
        The roots, like matrix; NaN for a matrix that is not finite, 0 for A = 0.

    Raises:
        ValueError, TypeError, NotImplementedError: as inverse_root.
    """
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix_inverse_root: matrix must be a tensor, got {checks.said(matrix)}")
    if matrix.dtype not in checks.DTYPES or matrix.layout != torch.strided:
        rule = "be dense and float32, float64, float16 or bfloat16"
        raise TypeError(f"matrix_inverse_root: matrix must {rule}, got {matrix.dtype} {matrix.layout}")
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix_inverse_root: matrix must have shape (..., n, n), got {tuple(matrix.shape)}")
    p = checks.number("matrix_inverse_root", "p", p, 0.0, "finite and > 0", open_end=True)
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32)).contiguous()
    side = matrix.shape[-1]
    batch = wide.reshape(-1, side, side) if wide.numel() else wide.new_empty(0, side, side)
    if method == "auto" and wide.device.type == "cpu":
        method = "eigh"
    found = inverse_root(batch, exponent=-1.0 / p, ridge=ridge, method=method, impl=impl)
    return found.root.reshape(matrix.shape).to(matrix.dtype)
