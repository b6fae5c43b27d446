"""What happens between the two skinny products, on N x R numbers: look-ahead products join, the inner norm scales.

    N tokens, D channels, R rows of the up matrix B

    raw = [own | past]                              [N, R]
    v = raw                                         without an inner norm
    v = s raw,  s = (raw G raw^T / D + eps)^-1/2    with one: the mean square of raw B needs G = B B^T alone

so that RMSNorm(raw B) = v B costs no pass over N x D.
"""

import torch
from torch import Tensor


def join(own_NS: Tensor | None, past_NP: Tensor | None, rank: int) -> Tensor:
    """The R columns that meet B: those of `own` that are not for later layers, then `past`."""
    if own_NS is None:
        assert past_NP is not None
        return past_NP
    if past_NP is None:
        return own_NS[:, :rank]
    return torch.cat([own_NS[:, : rank - past_NP.shape[1]], past_NP.to(own_NS.dtype)], 1)


def inverse_rms(raw_NR: Tensor, gram_RR: Tensor, dim: int, eps: float) -> Tensor:
    """s, [N, 1], in the type of `gram_RR`."""
    wide = raw_NR.to(gram_RR.dtype)
    square = torch.mm(wide, gram_RR).mul_(wide).sum(1, keepdim=True)
    # Rounding may leave a sum of squares just below zero.
    return square.clamp_min_(0.0).div_(dim).add_(eps).rsqrt_()


def scale_grad(grad_NR: Tensor, raw_NR: Tensor, gram_RR: Tensor, dim: int, eps: float, grad_gram_RR: Tensor) -> Tensor:
    """The gradient of `raw` from that of v = s raw, [N, R]; that of G (both its triangles) is added to `grad_gram`."""
    raw = raw_NR.to(gram_RR.dtype)
    s = inverse_rms(raw, gram_RR, dim, eps)
    of_square = (grad_NR * raw).sum(1, keepdim=True) * (s**3) * (-0.5 / dim)
    grad_gram_RR.addmm_(raw.t(), of_square * raw)
    return s * grad_NR + 2.0 * of_square * torch.mm(raw, gram_RR)
