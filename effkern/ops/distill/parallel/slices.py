"""A slice of the vocabulary and what it needs from the others: the tensors of one chunk, and indexing into a part.

R rows, V vocabulary, v entries of it in this slice (perhaps none), K entries of a sparse teacher
"""

from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill.reference import cap
from effkern.ops.distill.rows import RowOptions

Columns = dict[str, Tensor]


class RawSlice(NamedTuple):
    """One chunk as the products leave it. `start` is the first entry of the slice, `vocab` the size of the whole."""

    logits_Rv: Tensor
    teacher_Rv: Tensor | None
    ids_RK: Tensor | None
    logprobs_RK: Tensor | None
    bias_v: Tensor | None
    labels_R: Tensor
    scale_R: Tensor
    omega_R: Tensor
    start: int
    vocab: int


class Slice(NamedTuple):
    """The same with ignored rows replaced, and labels and ids as places in this slice.

    `own_R`: the label is here, at `y_R1`. Exactly one slice owns a row; it answers for what all of them know.
    `ids_RK` counts from the start of the whole vocabulary, -1 where a slot is empty.
    """

    z_Rv: Tensor
    u_Rv: Tensor | None
    ids_RK: Tensor | None
    logprobs_RK: Tensor | None
    label_R1: Tensor
    y_R1: Tensor
    own_R: Tensor
    valid_R: Tensor
    scale_R: Tensor
    omega_R: Tensor
    start: int
    vocab: int


def prepare(raw: RawSlice, options: RowOptions) -> Slice:
    """Bias, scale and softcap; an ignored row is replaced, not multiplied by zero: it may hold inf or NaN."""
    valid = raw.labels_R != options.ignore_index
    z = raw.logits_Rv if raw.bias_v is None else raw.logits_Rv + raw.bias_v
    z = torch.where(valid[:, None], cap(z, options.logit_scale, options.softcap), 0.0)
    u = raw.teacher_Rv
    if u is not None:
        u = torch.where(valid[:, None], u.to(z.dtype), 0.0)
    ids = raw.ids_RK
    if ids is not None:
        filled = valid[:, None] & (ids >= 0) & (ids < raw.vocab)
        ids = torch.where(filled, ids, -1).long()
    label = torch.where(valid, raw.labels_R, 0).long()[:, None]
    here = (label >= raw.start) & (label < raw.start + z.shape[1])
    y = torch.where(here, label - raw.start, 0)
    return Slice(
        z, u, ids, raw.logprobs_RK, label, y, here.squeeze(1), valid, raw.scale_R, raw.omega_R, raw.start, raw.vocab
    )


def pick(x_Rv: Tensor, place_RK: Tensor, here_RK: Tensor) -> Tensor:
    """The entries at `place_RK`, 0 where they are not `here_RK`."""
    if x_Rv.shape[1] == 0:
        return x_Rv.new_zeros(place_RK.shape)
    return torch.where(here_RK, x_Rv.gather(1, torch.where(here_RK, place_RK, 0)), 0.0)


def add_at(x_Rv: Tensor, place_RK: Tensor, here_RK: Tensor, value_RK: Tensor) -> Tensor:
    """`x_Rv` with `value_RK` added at the places that are here."""
    if x_Rv.shape[1] == 0:
        return x_Rv
    return x_Rv.scatter_add(1, torch.where(here_RK, place_RK, 0), torch.where(here_RK, value_RK, 0.0))


def at_label(x: Slice, values_Rv: Tensor) -> Tensor:
    """The label's entry, [R]; 0 where another slice has it."""
    return pick(values_Rv, x.y_R1, x.own_R[:, None]).squeeze(1)


def largest(values_Rv: Tensor) -> Tensor:
    """The largest entry, [R]; -inf in an empty slice."""
    if values_Rv.shape[1] == 0:
        return values_Rv.new_full((values_Rv.shape[0],), -torch.inf)
    return values_Rv.amax(-1)


def owned(x: Slice, value_R: Tensor) -> Tensor:
    """What every slice knows, as the share of the one that owns the row."""
    return torch.where(x.own_R, value_R, 0.0)
