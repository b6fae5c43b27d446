"""Shampoo's operations in plain PyTorch, any device and dtype; float64 stays float64.

B blocks, p side of a factor, m x n a block
"""

import torch
from torch import Tensor

from effkern.ops.shampoo import iterations
from effkern.ops.shampoo.common import count, guard, lambda_max, probe_residual
from effkern.ops.shampoo.methods import METHODS, root_of

# As in root.py.
COMPUTED, FELL_BACK, ZERO, FAILED = 0, 1, 2, 3
# Of the largest eigenvalue: below it the roundings of a float32 eigh are seen.
LEAST_SINGLE_RIDGE = 1e-5


def gram_ema_(
    factor_Bpp: Tensor, grads: list[Tensor], left: bool, decay: float, weight: float, failures: Tensor | None
) -> None:
    G = torch.stack(grads).to(factor_Bpp.dtype)
    gram = G @ G.mT if left else G.mT @ G
    ok = torch.isfinite(gram.diagonal(dim1=1, dim2=2)).all(1)
    lower = (decay * factor_Bpp + weight * gram).tril()
    L = lower + lower.tril(-1).mT
    factor_Bpp.copy_(torch.where(ok[:, None, None], L, factor_Bpp))
    count(failures, ok)


def inverse_root_(
    out: Tensor,
    factor_Bpp: Tensor,
    method: int,
    exponent: float,
    ridge: float,
    scale: float,
    pseudo_inverse: float,
    poles: list[float],
    weights: list[float],
    residual_bound: float,
    fresh: bool,
    failures: Tensor | None,
) -> tuple[Tensor, Tensor]:
    name = METHODS[method]
    A, ok, zero = guard(factor_Bpp)
    if name == "eigh":
        X = _eigh_root(A, exponent, ridge, pseudo_inverse)
    else:
        top = lambda_max(A)
        if name == "rational":
            X = _rational_root(A, top, exponent, ridge, poles, weights)
        else:
            X = iterations.root(A, top, name, root_of(exponent), ridge)
    X = (X + X.mT) / 2
    top = lambda_max(A)
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    checked = root_of(exponent) if pseudo_inverse < 0.0 and ridge > 0.0 else 0
    residual = probe_residual(A + (ridge * top)[:, None, None] * eye, X, checked)
    bad = ~((residual <= residual_bound) & torch.isfinite(X).all(2).all(1))
    status = torch.where(bad, FELL_BACK, COMPUTED)
    X = torch.where(bad[:, None, None], _eigh_root(A, exponent, ridge, pseudo_inverse), X)
    good = ok & torch.isfinite(X).all(2).all(1)
    status = torch.where(good, status, FAILED)
    status = torch.where(ok & zero, ZERO, status).to(torch.int32)
    kept = torch.zeros_like(out) if fresh else out
    if fresh:
        kept = torch.where((status == FAILED)[:, None, None], float("nan"), kept)
    out.copy_(torch.where((status <= FELL_BACK)[:, None, None], scale**exponent * X, kept))
    count(failures, status != FAILED)
    return torch.where(status <= FELL_BACK, residual, 0.0).float(), status


def _eigh_root(A: Tensor, exponent: float, ridge: float, pseudo_inverse: float) -> Tensor:
    """Q f(lambda) Q^T with f = (max(lambda, 0) + ridge lambda_max)^exponent, from A's lower triangle."""
    dtype = A.dtype
    lam, Q = _eigh(A.double() if ridge < LEAST_SINGLE_RIDGE else A)
    lam, top = lam.clamp_min(0.0), lam[:, -1:].clamp_min(0.0)
    f = (lam + ridge * top).clamp_min(torch.finfo(dtype).tiny) ** exponent
    if pseudo_inverse >= 0.0:
        f = torch.where(lam <= pseudo_inverse * top, 0.0, f)
    return ((Q * f[:, None, :]) @ Q.mT).to(dtype)


def _eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Again in float64 where the iteration does not converge, and then NaN: no matrix may end a run."""
    for matrices in (A, A.double()):
        try:
            lam, Q = torch.linalg.eigh(matrices, UPLO="L")
            return lam, Q
        except torch.linalg.LinAlgError:
            continue
    return torch.full_like(A[:, 0], float("nan")), torch.full_like(A, float("nan"))


def _rational_root(
    A: Tensor, top: Tensor, exponent: float, ridge: float, poles: list[float], weights: list[float]
) -> Tensor:
    """sum_k w_k (A / s + (delta + t_k) I)^-1 s^exponent with s = (1 + ridge) lambda_max."""
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    s = ((1.0 + ridge) * top)[:, None, None]
    delta = ridge / (1.0 + ridge)
    X = weights[-1] * eye.expand_as(A)
    for t, w in zip(poles, weights):
        L, info = torch.linalg.cholesky_ex(A / s + (delta + t) * eye)
        inverse = torch.cholesky_inverse(torch.where((info == 0)[:, None, None], L, eye))
        X = X + w * torch.where((info == 0)[:, None, None], inverse, float("nan"))
    return X * s**exponent


def apply_(
    weights: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    left: Tensor | None,
    right: Tensor | None,
    momentum_decay: float,
    momentum_weight: float,
    nesterov: bool,
    lr: float,
    lr_tensor: Tensor | None,
    weight_decay: float,
    norm: float,
    norms: Tensor | None,
    failures: Tensor | None,
) -> Tensor:
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    W, G = torch.stack(weights).to(wide), torch.stack(grads).to(wide)
    D = M = G
    if momenta:
        M = momentum_decay * torch.stack(momenta).to(wide) + momentum_weight * G
        D = momentum_decay * M + momentum_weight * G if nesterov else M
    U = D if left is None else left @ D
    U = U if right is None else U @ right
    size = torch.linalg.vector_norm(U, dim=(1, 2))
    ok = torch.isfinite(torch.linalg.vector_norm(G, dim=(1, 2))) & torch.isfinite(size)
    rate = lr if lr_tensor is None else lr_tensor.to(wide)
    target = norms.to(wide) if norms is not None else norm
    s = torch.ones_like(size)
    if norms is not None or norm > 0.0:
        s = torch.where(size > 0.0, target / size, 0.0)
    new = (1.0 - rate * weight_decay) * W - (rate * s)[:, None, None] * U
    for b, w in enumerate(weights):
        w.copy_(torch.where(ok[b], new[b].to(w.dtype), w))
        if momenta:
            momenta[b].copy_(torch.where(ok[b], M[b].to(momenta[b].dtype), momenta[b]))
    count(failures, ok)
    return torch.where(ok, size, float("nan")).float()
