"""The whitened-Gram form in plain PyTorch: any device, float32 and float64.

No result is read here, but on CUDA torch.linalg.eigh and eigvalsh wait for the device to check that they converged.

What the kernels compute, in the same order of stages. Tall products take the factors' dtype, r x r work float64.
F factors, r rank, `other` the neighbour of a pair. Symbols of the paper: whiten is R^-1 up to a rotation, transport P.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.ops.lora_rite.terms import EQUILIBRATED, Terms


def tall(x: Tensor, wide: bool) -> Tensor:
    return x.T if wide else x


def other(x: Tensor) -> Tensor:
    """[F, ...] with the two factors of each pair exchanged."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def gram(tensors: Sequence[Tensor], wide: Sequence[bool], whiten: Tensor | None) -> Tensor:
    """(X W)^T (X W) of each tensor; without `whiten` X^T X with all products in float64."""
    found = []
    for i, (x, is_wide) in enumerate(zip(tensors, wide)):
        x = tall(x, is_wide)
        y = x.double() if whiten is None else (x @ whiten[i].to(x.dtype)).double()
        found.append(y.T @ y)
    return torch.stack(found)


def traces(grams: Tensor, rows: Tensor, skip_rms: float) -> Tensor:
    """[F] squared norms of the unmagnified gradients, 0 where the root mean square is above the threshold."""
    trace = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    if skip_rms <= 0:
        return trace
    large = trace.isfinite() & (trace > skip_rms**2 * rows * grams.shape[-1])
    return torch.where(large, 0.0, trace)


def _decay(beta: float, t: Tensor) -> Tensor:
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def _keep(condition: Tensor, new: Tensor, old: Tensor) -> None:
    """old <- new where `condition`; NaN that is not taken leaves no trace."""
    old.copy_(torch.where(condition, new, old))


def precondition_(
    grams: Tensor, all_traces: Tensor, rows: Tensor, lr: Tensor, grad_scale: Tensor | None, whiten: Tensor,
    second: Tensor, transport: Tensor, escaped: Tensor, steps: Tensor, terms: Terms,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """r x r work between both tall passes: (gate, carry, take, apply, shrink) of the update.

    gate is the squared norm of all unmagnified gradients; where it is not finite nothing may be written.
    """
    gate = all_traces.sum()
    sound = gate.isfinite()
    norm = gate.sqrt()
    clip = torch.where(norm > terms.clip, terms.clip / norm, 1.0) if terms.clip > 0 else torch.ones_like(norm)
    share = clip * (traces(grams, rows, terms.skip_rms) != 0)
    grams = torch.where(sound, grams, 0.0) * share.square()[:, None, None]
    t = (steps + 1).double()
    b1, b2 = _decay(terms.beta1, t), _decay(terms.beta2, t)
    # P of the basis that a factor's moments are in: the other's.
    P = other(transport)
    carried = _symmetric(P * second[:, None, :] @ P.mT)
    mass = escaped
    if terms.escaped_mass:
        drop = second.sort(-1).values - torch.linalg.eigvalsh(carried)
        trace_drop = second.sum(-1) - carried.diagonal(dim1=-2, dim2=-1).sum(-1)
        mass = mass + torch.minimum(drop.amax(-1).clamp_min(0), trace_drop.clamp_min(0))
        mass = mass if terms.sum_second else mass * b2
    if terms.sum_second:
        V = carried + grams
    else:
        V = b2[:, None, None] * carried + ((1 - b2) / rows)[:, None, None] * grams
    values, E = torch.linalg.eigh(_symmetric(V))
    values = values.clamp_min(0)
    root = (values + mass[:, None]).sqrt()
    bottom = root + (terms.eps * root.amax(-1, keepdim=True) if terms.relative_eps else terms.eps)
    inverse = torch.where(bottom > 0, 1 / bottom, 0.0)
    turned = other(whiten) @ E
    carry = b1[:, None, None] * (P.mT @ E)
    scale = share * (1 - b1)
    if grad_scale is not None:
        scale = scale * grad_scale
    take = turned * (scale[:, None] * inverse)[:, None, :]
    apply = lr[:, None, None] * turned.mT
    shrink = 1 - lr * terms.weight_decay
    for new, old in ((values, second), (mass, escaped), (steps + 1, steps), (other(turned), whiten)):
        _keep(sound, new, old)
    return gate, carry, take, apply, shrink


def update_(
    factors: Sequence[Tensor], moments: Sequence[Tensor], grads: Sequence[Tensor], wide: Sequence[bool], gate: Tensor,
    carry: Tensor, take: Tensor, apply: Tensor, shrink: Tensor, whiten: Tensor, exact: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """M <- M carry + G take, X <- shrink X - M apply; then y^T y, y^T u and |X|^2 with y, u = X_new W, X_old W.

    Where `exact`, y and u are X_new and X_old, and all products float64.
    """
    sound = gate.isfinite()
    grams, crosses, sizes = [], [], []
    eye = torch.eye(whiten.shape[-1], dtype=whiten.dtype, device=whiten.device)
    for i, is_wide in enumerate(wide):
        X, M, G = (tall(x[i], is_wide) for x in (factors, moments, grads))
        is_exact, before = exact[i] != 0, X.clone()
        w = (carry[i], take[i], apply[i], shrink[i])
        fast, slow = ([x.to(dtype) for x in w] for dtype in (X.dtype, torch.float64))
        moment = torch.where(is_exact, M.double() @ slow[0] + G.double() @ slow[1], M @ fast[0] + G @ fast[1])
        _keep(sound, moment.to(M.dtype), M)
        moved = torch.where(is_exact, slow[3] * X.double() - M.double() @ slow[2], (fast[3] * X - M @ fast[2]).double())
        _keep(sound, moved.to(X.dtype), X)
        W = torch.where(is_exact, eye, whiten[i].to(X.dtype).double())
        y, u = X.double() @ W, before.double() @ W
        grams.append(y.T @ y)
        crosses.append(y.T @ u)
        sizes.append(X.double().square().sum())
    return torch.stack(grams), torch.stack(crosses), torch.stack(sizes)


def rebase_(
    grams: Tensor, crosses: Tensor, sizes: Tensor, gate: Tensor | None, whiten: Tensor, transport: Tensor,
    exact: Tensor, single: bool, tolerance: float,
) -> None:  # fmt: skip
    """whiten and transport of the factors as they are now, from update_'s products; see RiteGroup."""
    sound = torch.ones_like(sizes, dtype=torch.bool) if gate is None else gate.isfinite().expand_as(sizes)
    sound = sound & grams.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    grams = _symmetric(torch.where(sound[:, None, None], grams, 0.0))
    crosses = torch.where(sound[:, None, None], crosses, 0.0)
    is_exact = exact != 0
    eye = torch.eye(grams.shape[-1], dtype=torch.float64, device=grams.device).expand_as(grams)
    given = whiten.float().double() if single else whiten
    # y = X base; U_before = u last.
    base = torch.where(is_exact[:, None, None], eye, given)
    last = torch.where(is_exact[:, None, None], whiten, eye)
    L, info = torch.linalg.cholesky_ex(grams)
    pivots = L.diagonal(dim1=-2, dim2=-1).square()
    full = (info == 0) & (pivots > EQUILIBRATED * grams.diagonal(dim1=-2, dim2=-1)).all(-1) & ~is_exact
    inverse_L = torch.linalg.solve_triangular(torch.where(full[:, None, None], L, eye), eye, upper=False)
    values, Q = torch.linalg.eigh(grams)
    cut = torch.where(is_exact, tolerance**2, EQUILIBRATED) * values[:, -1]
    kept = values > cut[:, None]
    root = torch.where(kept, values, 1.0).rsqrt() * kept
    inverse = torch.where(full[:, None, None], inverse_L, root[:, :, None] * Q.mT)
    new_whiten = base @ inverse.mT
    new_transport = inverse @ crosses @ last
    # Whether a float32 Gram of X whiten will do in the next step.
    condition = sizes * new_whiten.square().sum((-1, -2))
    safe = (condition < tolerance**-2) & (full | (is_exact & kept.all(-1)))
    where = sound[:, None, None]
    _keep(where, new_whiten, whiten)
    _keep(where, new_transport, transport)
    _keep(sound, (~safe).to(exact.dtype), exact)
