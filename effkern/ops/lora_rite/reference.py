"""LoRA-RITE in plain PyTorch, pair by pair with QR, as the paper states it: the oracle of every faster form.

Z = A B^T with A [M, r] and B [N, r]; both factors are tall here, whatever layout a model keeps them in. Symbols of the
paper: U_B basis of B, R_B its triangle, g unmagnified gradient, P basis transport, V second moment, rho escaped mass,
M first moment of the preconditioned step. Everything runs in the inputs' own dtype; float64 is the truth of the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

RANK_TOLERANCE = 5e-7
"""Singular values of a factor at or below this share of its largest one count as zero."""


@dataclass(frozen=True)
class RiteOptions:
    """What LoRA-RITE leaves open; the defaults are those of the authors' code where it has one."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    relative_eps: bool = False
    """eps is a share of the largest root, sqrt(lambda_max(V) + rho), instead of absolute."""
    weight_decay: float = 0.0
    escaped_mass: bool = False
    """Add rho I to V, where rho is the decayed sum of what transports have lost."""
    second_moment: Literal["average", "sum"] = "average"
    """average: V <- b2(t) P V P^T + (1 - b2(t)) g^T g / rows. sum: V <- P V P^T + g^T g, and rho is not decayed."""
    clip_grad: float = 1.0
    """Largest norm of all unmagnified gradients of all pairs together; 0 does not clip."""
    skip_rms: float = 1.0
    """A factor whose unmagnified gradient has a larger root mean square takes g = 0 in this step; 0 never skips."""
    rank_tolerance: float = RANK_TOLERANCE


class FactorState(NamedTuple):
    """State of one factor, in the basis of the *other* factor of its pair."""

    M: Tensor
    """First moment, [rows, r]."""
    V: Tensor
    """Second moment, [r, r], symmetric."""
    rho: Tensor
    """Escaped mass, 0-d."""
    U_other: Tensor
    """Basis of the other factor at the last step, [other rows, r]; zero before the first one."""


class Pair(NamedTuple):
    """One pair of tall factors with its state after `t` steps."""

    A: Tensor
    B: Tensor
    state_A: FactorState
    state_B: FactorState
    t: int = 0


def new_pair(A: Tensor, B: Tensor) -> Pair:
    """A pair before its first step."""

    def fresh(own: Tensor, other: Tensor) -> FactorState:
        r = own.shape[1]
        return FactorState(torch.zeros_like(own), own.new_zeros(r, r), own.new_zeros(()), torch.zeros_like(other))

    return Pair(A, B, fresh(A, B), fresh(B, A))


def decay(beta: float, t: int) -> float:
    """b(t) = b (1 - b^(t-1)) / (1 - b^t), t from 1: a moving average that needs no other bias correction; b(1) = 0."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


class Basis(NamedTuple):
    """B = U R up to the rank tolerance."""

    U: Tensor
    """[rows, r]: an orthonormal basis of the range of B where B has full rank, else the part of Q that lies in it."""
    pinv_R: Tensor
    """[r, r], zero outside the range."""


def basis(X: Tensor, rank_tolerance: float) -> Basis:
    """QR of X, without the directions whose singular value is at or below the tolerance.

    QR completes the basis of a rank-deficient X by rounding noise; those columns would get full-size steps. Here they
    are projected out, so that the result depends on X alone. A factor with fewer rows than columns is always such a
    one; rows of zeros change none of its products.
    """
    rows, r = X.shape
    padded = X if rows >= r else torch.cat([X, X.new_zeros(r - rows, r)])
    Q, R = torch.linalg.qr(padded)
    left, sigma, right = torch.linalg.svd(R)
    kept = sigma > rank_tolerance * sigma[0]
    inverse = torch.where(kept, 1 / torch.where(kept, sigma, 1.0), 0.0)
    left = left * kept
    return Basis((Q @ (left @ left.T))[:rows], right.T * inverse @ left.T)


def inverse_root(V: Tensor, rho: Tensor, eps: float, relative: bool) -> Tensor:
    """(V + rho I)^-1/2, damped: eigenvalues w become 1 / (sqrt(max(w, 0) + rho) + eps), and 0 where that is 1 / 0."""
    w, Q = torch.linalg.eigh((V + V.T) / 2)
    root = (w.clamp_min(0) + rho).sqrt()
    bottom = root + (eps * root.amax() if relative else eps)
    return Q * torch.where(bottom > 0, 1 / bottom, 0.0) @ Q.T


def escaped(V: Tensor, V_new: Tensor) -> Tensor:
    """d_lambda(V, P V P^T): the largest drop of a sorted eigenvalue, at most the drop of the trace, at least 0."""
    drop = (torch.linalg.eigvalsh(V) - torch.linalg.eigvalsh(V_new)).amax().clamp_min(0)
    return torch.minimum(drop, (V.trace() - V_new.trace()).clamp_min(0))


def _unmagnified(grad: Tensor, other: Basis, skip_rms: float) -> Tensor:
    """g = grad R_other^+, or 0 where its root mean square is above the threshold."""
    g = grad @ other.pinv_R
    skipped = skip_rms > 0 and bool(g.square().mean().sqrt() > skip_rms)
    return torch.zeros_like(g) if skipped else g


def _factor_step(
    X: Tensor, g: Tensor, other: Basis, state: FactorState, t: int, lr: float | Tensor, options: RiteOptions
) -> tuple[Tensor, FactorState]:
    beta1, beta2 = options.betas
    P = other.U.T @ state.U_other
    V = P @ state.V @ P.T
    V = (V + V.T) / 2
    rho = state.rho
    b2 = decay(beta2, t)
    if options.escaped_mass:
        rho = rho + escaped(state.V, V)
        rho = rho * b2 if options.second_moment == "average" else rho
    gram = g.T @ g
    V = b2 * V + (1 - b2) * gram / len(g) if options.second_moment == "average" else V + gram
    S = g @ inverse_root(V, rho, options.eps, options.relative_eps)
    b1 = decay(beta1, t)
    M = b1 * (state.M @ P.T) + (1 - b1) * S
    X = X - lr * (M @ other.pinv_R.T + options.weight_decay * X)
    return X, FactorState(M, V, rho, other.U)


def rite_step(
    pairs: Sequence[Pair],
    grads: Sequence[tuple[Tensor, Tensor]],
    lrs: Sequence[tuple[float | Tensor, float | Tensor]],
    options: Sequence[RiteOptions],
) -> list[Pair]:
    """One LoRA-RITE step of all pairs; returns the new ones and leaves its inputs as they are.

    For factor A of Z = A B^T, with b(t) as in `decay` (B is the mirror image, from the same old A and B):

        B = U_B R_B,  g = grad_A R_B^+,  P = U_B(t)^T U_B(t-1)
        rho <- b2(t) (rho + d_lambda(V, P V P^T))
        V <- b2(t) P V P^T + (1 - b2(t)) g^T g / rows
        M <- b1(t) M P^T + (1 - b1(t)) g (V + rho I)^-1/2
        A <- A - lr (M R_B^+T + weight_decay A)

    If a gradient of any pair is not finite, nothing changes, t included.

    Args:
        pairs: tall factors and their states.
        grads: (grad_A, grad_B) of each pair, of the factors' shapes.
        lrs: learning rates of A and of B, pair by pair.
        options: of each pair; all share clip_grad and skip_rms.

    Memory: all tensors are new. Deterministic.
    Source: Yen et al., LoRA Done RITE, arXiv 2410.20625, Algorithm 1; the moving average of V, its division by the
        number of rows, clipping, skipping and the decay of rho follow the authors' published code.
    """
    if not all(torch.isfinite(grad).all() for both in grads for grad in both):
        return list(pairs)
    bases = [(basis(p.A, o.rank_tolerance), basis(p.B, o.rank_tolerance)) for p, o in zip(pairs, options)]
    unmagnified = [
        (_unmagnified(grad_A, of_B, o.skip_rms), _unmagnified(grad_B, of_A, o.skip_rms))
        for (grad_A, grad_B), (of_A, of_B), o in zip(grads, bases, options)
    ]
    if options and options[0].clip_grad > 0:
        limit = options[0].clip_grad
        norm = torch.stack([g.square().sum() for both in unmagnified for g in both]).sum().sqrt()
        scale = torch.where(norm > limit, limit / norm, 1.0)
        unmagnified = [(g_A * scale, g_B * scale) for g_A, g_B in unmagnified]
    result = []
    for pair, (g_A, g_B), (of_A, of_B), (lr_A, lr_B), o in zip(pairs, unmagnified, bases, lrs, options):
        t = pair.t + 1
        A, state_A = _factor_step(pair.A, g_A, of_B, pair.state_A, t, lr_A, o)
        B, state_B = _factor_step(pair.B, g_B, of_A, pair.state_B, t, lr_B, o)
        result.append(Pair(A, B, state_A, state_B, t))
    return result


__all__ = [
    "RANK_TOLERANCE",
    "FactorState",
    "Pair",
    "RiteOptions",
    "basis",
    "decay",
    "escaped",
    "inverse_root",
    "new_pair",
    "rite_step",
]
