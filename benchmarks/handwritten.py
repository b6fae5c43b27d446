"""The losses as one writes them by hand: what eager PyTorch and torch.compile are given in the benchmarks."""

import torch
import torch.nn.functional as F
from torch import Tensor

OMEGA = 0.5
PARAMETERS = {"alpha": 0.1, "beta": 0.5}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logsumexp(torch.stack([log_p + torch.tensor(share).log(), log_q + torch.tensor(1 - share).log()]), 0)


def divergence(name: str, z: Tensor, u: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows of D(softmax(u), softmax(z))."""
    alpha, beta = PARAMETERS["alpha"], PARAMETERS["beta"]
    if name.endswith("mse"):
        if name != "mse":
            z, u = z - z.mean(-1, keepdim=True), u - u.mean(-1, keepdim=True)
        if name == "zscored_mse":
            z, u = z / z.std(-1, keepdim=True, correction=0), u / u.std(-1, keepdim=True, correction=0)
        return F.mse_loss(z, u)
    if name == "cosine":
        return (1 - F.cosine_similarity(z, u, dim=-1)).mean()
    if name == "decoupled_kl":
        return _decoupled(z, u, labels)
    log_q, log_p = F.log_softmax(z, -1), F.log_softmax(u, -1)
    if name == "forward_kl":
        return _kl(log_p, log_q)
    if name == "reverse_kl":
        return _kl(log_q, log_p)
    if name == "symmetric_kl":
        return beta * _kl(log_p, log_q) + (1 - beta) * _kl(log_q, log_p)
    if name == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean()
    if name == "skew_forward_kl":
        return _kl(log_p, _mixture(log_p, log_q, alpha))
    if name == "skew_reverse_kl":
        return _kl(log_q, _mixture(log_p, log_q, 1 - alpha))
    log_m = _mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _decoupled(z: Tensor, u: Tensor, labels: Tensor) -> Tensor:
    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        at = F.log_softmax(logits, -1).gather(1, labels[:, None])
        pair = torch.cat([at, torch.log1p(-at.exp().clamp(max=1 - 1e-6))], -1)
        return pair, F.log_softmax(logits.scatter(1, labels[:, None], -1e9), -1)

    (pair_q, rest_q), (pair_p, rest_p) = parts(z), parts(u)
    return PARAMETERS["alpha"] * _kl(pair_p, pair_q) + PARAMETERS["beta"] * _kl(rest_p, rest_q)


def loss(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    """(1 - omega) CE + omega D over logits of the whole batch."""
    logits = hidden @ weight.t()
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    hard = F.cross_entropy(logits, labels)
    if teacher is None:
        return hard
    return (1 - OMEGA) * hard + OMEGA * divergence(name, logits, teacher.to(wide), labels)
