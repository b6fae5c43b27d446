"""A sparse teacher against a slice of the vocabulary: every rank learns all K logits, and has the slope on its slice.

R rows, V vocabulary, v entries of it in this slice, K entries of the teacher; formulas in effkern.ops.distill.sparse
"""

import torch
from torch import Tensor

from effkern.ops.distill import sparse
from effkern.ops.distill.parallel.slices import Slice, add_at, at_label, owned, pick
from effkern.ops.distill.rows import RowOptions
from effkern.ops.distill.sparse import Kept


def _here(x: Slice, ids: Tensor) -> Tensor:
    return (ids >= x.start) & (ids < x.start + x.z_Rv.shape[1])


def logits(x: Slice) -> Tensor:
    """This slice's part of the student's logits at the teacher's ids, [R, K]; zero where another slice has them."""
    assert x.ids_RK is not None
    return pick(x.z_Rv, x.ids_RK - x.start, _here(x, x.ids_RK))


def _times(x: Slice) -> Tensor:
    """In how many slots an entry of this slice stands, [R, v]."""
    assert x.ids_RK is not None
    one = torch.ones_like(x.ids_RK, dtype=x.z_Rv.dtype)
    return add_at(torch.zeros_like(x.z_Rv), x.ids_RK - x.start, _here(x, x.ids_RK), one)


def outside(x: Slice, mass_Rv: Tensor) -> Tensor:
    """This slice's part of the mass off the kept entries, [R]: one minus the kept sum would cancel."""
    return ((1 - _times(x)) * mass_Rv).sum(-1)


def target(x: Slice, log_q_RK: Tensor, outside_R: Tensor | None, options: RowOptions) -> Kept:
    """The kept entries, from the student's log-probabilities at them. `ids` count over the whole vocabulary.

    `outside_R`: q off the kept entries, of a tail bucket.
    """
    assert x.ids_RK is not None
    assert x.logprobs_RK is not None
    filled = x.ids_RK >= 0
    # The K entries are a vocabulary of their own here; ids come back afterwards.
    places = torch.where(filled, torch.arange(filled.shape[1], device=filled.device), -1)
    own = sparse.gather(log_q_RK, places, x.logprobs_RK, x.label_R1, options)
    own = own._replace(ids=x.ids_RK, is_label=filled & (x.ids_RK == x.label_R1))
    return own if outside_R is None else own._replace(outside=outside_R)


def _others(x: Slice, kept: Kept) -> tuple[Tensor, Tensor]:
    """Number of entries in a uniform tail, and the mass of each, [R]."""
    others = x.vocab - kept.filled.sum(-1)
    return others, torch.where(others > 0, kept.tail / others.clamp_min(1), 0.0)


def slope(x: Slice, kept: Kept, q_Rv: Tensor, options: RowOptions) -> Tensor:
    """dD / d(z / T) on this slice, [R, v]."""
    c = sparse.coefficients(kept, x.vocab, options)
    times = _times(x) if options.teacher == "tail_bucket" else None
    dense, delta = sparse.slope_parts(kept, c, q_Rv, times, options)
    result = add_at(dense, kept.ids - x.start, _here(x, kept.ids), delta)
    return add_at(result, x.y_R1, x.own_R[:, None], c.at_label)


def share(x: Slice, kept: Kept, log_q_Rv: Tensor, options: RowOptions) -> Tensor:
    """This slice's share of D, [R]."""
    if options.teacher == "uniform_tail":
        others, each = _others(x, kept)
        none = x.y_R1[:, :0]
        base = sparse.value(kept, log_q_Rv, none, options._replace(teacher="truncated"))
        base = base + torch.xlogy(each, each) * others
        base = base + torch.where(each > 0, each * torch.where(kept.filled, kept.log_q, 0.0).sum(-1), 0.0)
        return owned(x, base) - torch.where(each > 0, each * log_q_Rv.sum(-1), 0.0)
    # The label's entry is the only one besides the kept ones that the other kinds look at.
    return owned(x, sparse.value(kept, at_label(x, log_q_Rv)[:, None], torch.zeros_like(x.y_R1), options))


def stats(x: Slice, kept: Kept, student_largest_RK: Tensor, options: RowOptions) -> tuple[Tensor, ...]:
    """teacher_lse, teacher_label_logprob, teacher_entropy, teacher_hit, agreement, each [R]."""
    assert x.logprobs_RK is not None
    dtype = kept.t.dtype
    lse = torch.where(kept.filled, x.logprobs_RK.to(dtype), -torch.inf).logsumexp(-1)
    best = kept.filled & (kept.t == kept.t.amax(-1, keepdim=True)) & (kept.t > 0)
    return (
        lse,
        sparse.label_log_target(kept, x.vocab, options),
        sparse.entropy(kept, x.vocab, options),
        (best & kept.is_label).any(-1).to(dtype),
        (best & student_largest_RK).any(-1).to(dtype),
    )
