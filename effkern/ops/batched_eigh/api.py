"""batched_eigh: eigenvalues and eigenvectors of many small symmetric matrices at once."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.batched_eigh import reference
from effkern.ops.batched_eigh import schema as schema

OP = "batched_eigh"
METHODS = ("auto", "jacobi", "lapack")
MAX_ORDER = 128
"""Of the own solver."""


class BatchedEigh(NamedTuple):
    """See batched_eigh."""

    values: Tensor
    """[..., n], ascending."""
    vectors: Tensor
    """[..., n, n], in columns."""
    status: Tensor
    """[...], int32: 0 converged, 1 the matrix is not finite (values and vectors are NaN), 2 not converged."""


def batched_eigh(matrices: Tensor, *, method: str = "auto", impl: str = "auto") -> BatchedEigh:
    """A = Q diag(w) Q^T for every symmetric A of a batch, at the cost of one call.

    Backward error and loss of orthogonality, |A - Q diag(w) Q^T| / |A| and |Q^T Q - I|, both in the Frobenius norm,
    stay below 4 n eps; tests hold it on clustered, rank-deficient, graded and scaled matrices. On positive definite
    matrices D H D with H well conditioned Jacobi also keeps the relative accuracy of the small eigenvalues.
    No matrix disturbs another, and none raises: NaN and infinity give NaN and status 1. The sign of a vector, and the
    basis of an eigenvalue that comes several times, are free.

    Args:
        matrices: [..., n, n], float32 or float64. Only the lower triangle is read. Gets no gradient.
        method: "jacobi" (cyclic Jacobi, n <= 128: some matrices per CPU thread, one block per matrix on a GPU),
            "lapack" (CPU: syevd, one matrix per thread; GPU: torch.linalg.eigh) or "auto": the faster for this n.
        impl: "auto", "cpp", "cuda" or "reference" (torch.linalg.eigh).

    Returns:
        BatchedEigh(values, vectors, status).

    Raises:
        ValueError: matrices are not square; the method is unknown, or "jacobi" with n > 128.
        TypeError: no tensor, or a dtype other than float32 and float64.
        NotImplementedError: impl cannot run on the device, or covers no such n; matrices require a gradient.

    Memory: the results; per thread 16 (float64) or 32 (float32) matrices. Deterministic, "cpp" and "cuda" whatever the
    number of threads.
    At most 40 sweeps, so that every call ends. "cuda" reads nothing on the host; torch.linalg.eigh, so "lapack" and
    "reference" on CUDA, waits for the device.
    Source: cyclic Jacobi as in Golub and Van Loan, Matrix Computations, section 8.5; stopping rule: Demmel and Veselic,
    Jacobi's method is more accurate than QR, 1992.
    """
    _check(matrices, method)
    shape = matrices.shape
    n = shape[-1]
    chosen = registry.choose(OP, impl, matrices.device)
    if chosen == "cuda" and (n > MAX_ORDER or method == "lapack"):
        if impl == "cuda":
            raise NotImplementedError(
                f"{OP}: impl='cuda' takes n <= {MAX_ORDER} and method 'jacobi' or 'auto', got {n}"
            )
        chosen = "reference"
    if chosen == "reference" and method == "jacobi":
        raise NotImplementedError(f"{OP}: method='jacobi' needs the compiled kernels, impl='reference' has none")
    flat = matrices.detach().reshape(math.prod(shape[:-2]), n, n)
    if flat.numel() == 0 or chosen == "reference":
        values, vectors, status = reference.batched_eigh(flat)
    else:
        values, vectors, status = torch.ops.effkern.batched_eigh(flat.contiguous(), METHODS.index(method))
    return BatchedEigh(values.reshape(shape[:-1]), vectors.reshape(shape), status.reshape(shape[:-2]))


def _check(matrices: Any, method: Any) -> None:
    if not isinstance(matrices, Tensor):
        raise TypeError(f"{OP}: matrices must be a tensor, got {type(matrices).__name__}")
    if matrices.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{OP}: matrices must be float32 or float64, got {matrices.dtype}")
    if matrices.dim() < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"{OP}: matrices must have shape [..., n, n], got {tuple(matrices.shape)}")
    if method not in METHODS:
        raise ValueError(f"{OP}: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if method == "jacobi" and matrices.shape[-1] > MAX_ORDER:
        raise ValueError(f"{OP}: matrices must have n <= {MAX_ORDER} for method='jacobi', got {matrices.shape[-1]}")
    if matrices.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{OP}: matrices must not require a gradient: there is none; detach them")
