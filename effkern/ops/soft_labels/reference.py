"""Plain PyTorch of the row pass, on any device; the oracle of the compiled kernel, and what CUDA tensors use.

    x = z / T,  e_v = exp(x_v - max x),  p_v = e_v / sum e,  R rows, V vocabulary, K slots a row

Everything between the logits and the outputs is float64, so that all implementations cut the interval [0, 1) into the
same pieces (up to 1e-15) and a draw falls into the same one.
"""

import torch
from torch import Tensor

from effkern.ops.soft_labels.rows import RowOptions, num_slots

# Constants of splitmix64, as signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def reference_rows(
    logits_RV: Tensor, positions_R: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, logprobs, tail, lse) of each row, as api.soft_labels defines them."""
    o, vocab = options, logits_RV.shape[1]
    x_RV = logits_RV.double() * (1.0 / o.temperature)
    lse_R = torch.logsumexp(x_RV, dim=1)
    valid_R = torch.isfinite(lse_R)
    e_RV = torch.exp(x_RV - x_RV.amax(dim=1, keepdim=True)).masked_fill(~valid_R[:, None], 0.0)
    total_R = e_RV.sum(dim=1)

    ids, logprobs = [], []
    if o.method != "sampled":
        head = _top(logits_RV, min(o.k, vocab))
        empty = torch.isneginf(x_RV.gather(1, head)) | ~valid_R[:, None]
        ids.append(head.masked_fill(empty, -1))
        logprobs.append((x_RV.gather(1, head) - lse_R[:, None]).masked_fill(empty, -torch.inf))
        e_RV = e_RV.scatter(1, head, 0.0)
    tail_R = e_RV.sum(dim=1) / total_R
    if o.method != "topk":
        drawn, counts = _draw(e_RV, positions_R, o, min(o.draws, vocab))
        scale = torch.ones_like(tail_R) if o.method == "sampled" else tail_R
        ids.append(drawn)
        found = torch.log(scale[:, None] * (counts.double() / o.draws))
        logprobs.append(found.masked_fill(drawn < 0, -torch.inf))
        if o.method == "sampled":
            outside = torch.cat((e_RV, e_RV.new_zeros(e_RV.shape[0], 1)), dim=1)
            tail_R = outside.scatter(1, torch.where(drawn < 0, vocab, drawn), 0.0).sum(dim=1) / total_R
    out = torch.promote_types(logits_RV.dtype, torch.float32)
    ids_RK, logprobs_RK = torch.cat(ids, dim=1).int(), torch.cat(logprobs, dim=1).to(out)
    assert ids_RK.shape[1] == num_slots(o, vocab)
    return ids_RK, logprobs_RK, tail_R.masked_fill(~valid_R, torch.nan).to(out), lse_R.to(out)


def _top(logits_RV: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits, falling; of equal ones the lower id comes first."""
    if logits_RV.dtype == torch.float64:
        return logits_RV.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # One integer that orders by logit, then by id: torch.topk leaves open which of equal values it takes.
    bits = (logits_RV.float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    return ((ordered << 32) + (0xFFFFFFFF - ids)).topk(k, dim=1).indices


def _draw(e_RV: Tensor, positions_R: Tensor, options: RowOptions, slots: int) -> tuple[Tensor, Tensor]:
    """Ids drawn in proportion to e, rising, and how often; -1 and 0 in empty slots."""
    cdf_RV = e_RV.cumsum(dim=1)
    mass_R1 = cdf_RV[:, -1:]
    targets = uniforms(positions_R, options.draws, options.seed).sort(dim=1).values * mass_R1
    drawn = torch.searchsorted(cdf_RV, targets, right=True).clamp_(max=e_RV.shape[1] - 1)
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = first.long().cumsum(dim=1) - 1
    empty = drawn.new_full((drawn.shape[0], slots), -1)
    some = (mass_R1 > 0).long().expand_as(slot)
    counts = torch.zeros_like(empty).scatter_add_(1, slot, some)
    return torch.where(counts > 0, empty.scatter(1, slot, drawn), -1), counts


def uniforms(positions_R: Tensor, draws: int, seed: int) -> Tensor:
    """[R, draws] numbers in [0, 1), float64: draw j of a position is a function of (seed, position, j) alone.

    A splitmix64 stream that starts at mix(mix(seed) + position).
    """
    device = positions_R.device
    start = _mix(_mix(torch.full((), seed, dtype=torch.int64, device=device)) + positions_R)
    steps = torch.arange(1, draws + 1, device=device) * _GOLDEN
    return _unsigned_shift(_mix(start[:, None] + steps), 11).double() * 2.0**-53


def _unsigned_shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _unsigned_shift(x, 30)) * _FIRST
    x = (x ^ _unsigned_shift(x, 27)) * _SECOND
    return x ^ _unsigned_shift(x, 31)
