"""Divergences as textbooks write them and their gradients as derived on paper, in float64; nothing of the package.

    z, u logits [R, V], q = softmax(z / T), p = softmax(u / T'), a = log q, b = log p, y labels [R, 1]
    t masses [R, K] of a sparse teacher at `ids`, S = sum t, Q = sum of q over them

Naive on purpose: for moderate logits without masks. Gradients are those with respect to z / T.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Dense(NamedTuple):
    z: Tensor
    u: Tensor
    y: Tensor
    q: Tensor
    p: Tensor
    a: Tensor
    b: Tensor


def dense(z: Tensor, u: Tensor, y: Tensor, t_student: float = 1.0, t_teacher: float = 1.0) -> Dense:
    q, p = (z / t_student).exp(), (u / t_teacher).exp()
    q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
    return Dense(z, u, y[:, None], q, p, q.log(), p.log())


def given(z: Tensor, logprobs: Tensor, y: Tensor, t_student: float = 1.0) -> Dense:
    """Log-probabilities taken as they are, whatever their mass."""
    x = dense(z, logprobs, y, t_student)
    return x._replace(p=logprobs.exp(), b=logprobs)


def relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def apart(x: Dense) -> tuple[Tensor, ...]:
    """q_y, p_y [R, 1], and the distributions over the other entries (0 at the label)."""
    q_y, p_y = x.q.gather(1, x.y), x.p.gather(1, x.y)
    off = torch.ones_like(x.q).scatter(1, x.y, 0.0)
    return q_y, p_y, off * x.q / (1 - q_y), off * x.p / (1 - p_y)


def value(x: Dense, name: str, alpha: float, beta: float) -> Tensor:
    z, u, _, q, p, _, _ = x
    centred = [v - v.mean(-1, keepdim=True) for v in (z, u)]
    scored = [v / v.pow(2).mean(-1, keepdim=True).sqrt() for v in centred]
    if name == "decoupled_kl":
        q_y, p_y, q_rest, p_rest = apart(x)
        pair = [torch.cat([v, 1 - v], 1) for v in (p_y, q_y)]
        within = torch.where(p_rest > 0, p_rest * (p_rest / q_rest).log(), 0.0).sum(-1)
        return alpha * relative_entropy(*pair) + beta * within
    return {
        "forward_kl": lambda: relative_entropy(p, q),
        "reverse_kl": lambda: relative_entropy(q, p),
        "symmetric_kl": lambda: beta * relative_entropy(p, q) + (1 - beta) * relative_entropy(q, p),
        "jsd": lambda: (
            beta * relative_entropy(p, beta * p + (1 - beta) * q)
            + (1 - beta) * relative_entropy(q, beta * p + (1 - beta) * q)
        ),
        "skew_forward_kl": lambda: relative_entropy(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: relative_entropy(q, (1 - alpha) * p + alpha * q),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
        "mse": lambda: (z - u).pow(2).mean(-1),
        "centered_mse": lambda: (centred[0] - centred[1]).pow(2).mean(-1),
        "zscored_mse": lambda: (scored[0] - scored[1]).pow(2).mean(-1),
        "cosine": lambda: 1 - (z * u).sum(-1) / (z.norm(dim=-1) * u.norm(dim=-1)),
    }[name]()


def gradient(x: Dense, name: str, alpha: float, beta: float) -> Tensor:
    """The table of the derivation, line by line."""
    z, u, y, q, p, a, b = x
    if name == "forward_kl":
        return p.sum(-1, keepdim=True) * q - p
    if name == "reverse_kl":
        r = a - b
        return q * (r - (q * r).sum(-1, keepdim=True))
    if name == "symmetric_kl":
        return beta * gradient(x, "forward_kl", 0, 0) + (1 - beta) * gradient(x, "reverse_kl", 0, 0)
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return (1 - beta) * q * (a - m.log() - relative_entropy(q, m)[:, None])
    if name == "skew_forward_kl":
        w = (1 - alpha) * p * q / (alpha * p + (1 - alpha) * q)
        return q * w.sum(-1, keepdim=True) - w
    if name == "skew_reverse_kl":
        m = (1 - alpha) * p + alpha * q
        h = a - m.log() - alpha * q / m
        return q * (h - (q * h).sum(-1, keepdim=True))
    if name == "tvd":
        s = torch.sign(q - p)
        return q * (s - (q * s).sum(-1, keepdim=True)) / 2
    if name == "decoupled_kl":
        q_y, p_y, q_rest, p_rest = apart(x)
        return (alpha * q_rest * (p_y - q_y) + beta * (q_rest - p_rest)).scatter(1, y, alpha * (q_y - p_y))
    vocab = z.shape[1]
    if name == "mse":
        return 2 / vocab * (z - u)
    zc, uc = z - z.mean(-1, keepdim=True), u - u.mean(-1, keepdim=True)
    if name == "centered_mse":
        return 2 / vocab * (zc - uc)
    if name == "zscored_mse":
        sd = zc.pow(2).mean(-1, keepdim=True).sqrt()
        d = zc / sd
        g = 2 / vocab * (d - uc / uc.pow(2).mean(-1, keepdim=True).sqrt())
        return (g - g.mean(-1, keepdim=True) - d * (g * d).mean(-1, keepdim=True)) / sd
    assert name == "cosine"
    nz, nu = z.norm(dim=-1, keepdim=True), u.norm(dim=-1, keepdim=True)
    return (z * u).sum(-1, keepdim=True) / (nz * nu) * z / nz.pow(2) - u / (nz * nu)


class Sparse(NamedTuple):
    """[R, K] but for `q` [R, V] and y [R, 1]; every slot is filled, ids are distinct."""

    ids: Tensor
    t: Tensor
    q: Tensor
    y: Tensor


def full_target(x: Sparse, kind: str) -> Tensor:
    """The target over the whole vocabulary, [R, V], of the kinds that describe one."""
    kept = torch.zeros_like(x.q).scatter(1, x.ids, x.t)
    rest = 1 - x.t.sum(-1, keepdim=True)
    if kind == "renormalized":
        return kept / kept.sum(-1, keepdim=True)
    if kind == "tail_to_label":
        return kept.scatter_add(1, x.y, rest)
    if kind == "uniform_tail":
        outside = torch.ones_like(x.q).scatter(1, x.ids, 0.0)
        return kept + outside * rest / (x.q.shape[1] - x.ids.shape[1])
    assert kind in ("truncated", "sampled", "stratified")
    return kept


def sparse_value(x: Sparse, kind: str, reverse: bool = False) -> Tensor:
    q_kept, total, mass = x.q.gather(1, x.ids), x.q.gather(1, x.ids).sum(-1, keepdim=True), x.t.sum(-1, keepdim=True)
    if kind == "both_renormalized":
        return relative_entropy(x.t / mass, q_kept / total)
    if kind == "tail_bucket":
        cells = torch.cat([x.t, 1 - mass], 1), torch.cat([q_kept, 1 - total], 1)
        return relative_entropy(*(cells[::-1] if reverse else cells))
    target = full_target(x, kind)
    return torch.where(target > 0, target * (target / x.q).log(), 0.0).sum(-1)


def sparse_gradient(x: Sparse, kind: str, reverse: bool = False) -> Tensor:
    q, q_kept = x.q, x.q.gather(1, x.ids)
    total, mass = q_kept.sum(-1, keepdim=True), x.t.sum(-1, keepdim=True)
    if kind in ("truncated", "sampled", "stratified"):
        return (mass * q).scatter(1, x.ids, mass * q_kept - x.t)
    if kind == "renormalized":
        return q.scatter(1, x.ids, q_kept - x.t / mass)
    if kind == "both_renormalized":
        return torch.zeros_like(q).scatter(1, x.ids, q_kept / total - x.t / mass)
    if kind == "tail_bucket" and reverse:
        r, r_tail = (q_kept / x.t).log(), ((1 - total) / (1 - mass)).log()
        d = (q_kept * r).sum(-1, keepdim=True) + (1 - total) * r_tail
        return (q * (r_tail - d)).scatter(1, x.ids, q_kept * (r - d))
    if kind == "tail_bucket":
        return (q * (mass - total) / (1 - total)).scatter(1, x.ids, q_kept - x.t)
    if kind == "tail_to_label":
        return q.scatter(1, x.ids, q_kept - x.t).scatter_add(1, x.y, mass - 1)
    assert kind == "uniform_tail"
    return (q - (1 - mass) / (q.shape[1] - x.ids.shape[1])).scatter(1, x.ids, q_kept - x.t)
