"""The pairs of a group that have gradients, as a group of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effkern.ops.lora_rite.group import OP, STATE, RiteGroup

STACKED = (*STATE[1:], "rows")


@dataclass
class Part:
    whole: RiteGroup
    group: RiteGroup
    grads: list[Tensor]
    index: Tensor | None
    """Places of the part's factors in the whole; None: it is the whole."""

    def rates(self, lr: Tensor) -> Tensor:
        return lr if self.index is None else lr[self.index]


def subset(group: RiteGroup, grads: Any) -> Part | None:
    """None if no pair has gradients. State of a part is a copy until `put_back`."""
    if not isinstance(grads, (list, tuple)) or len(grads) != len(group.factors):
        got = len(grads) if isinstance(grads, Sequence) else type(grads).__name__
        raise ValueError(f"{OP}: grads must hold one entry per factor, {len(group.factors)}, got {got}")
    places = [i for i in range(len(grads)) if grads[i] is not None and grads[i ^ 1] is not None]
    if not places:
        return None
    if len(places) == len(grads):
        return Part(group, group, list(grads), None)
    index = group.cache.get(tuple(places))
    if index is None:
        index = group.cache[tuple(places)] = torch.tensor(places, device=group.whiten.device)
    some = {name: getattr(group, name)[index] for name in STACKED}
    part = RiteGroup(
        [group.factors[i] for i in places], [group.wide[i] for i in places], [group.moments[i] for i in places], **some
    )
    return Part(group, part, [grads[i] for i in places], index)


def put_back(part: Part) -> None:
    if part.index is None:
        return
    for name in STATE[1:]:
        getattr(part.whole, name).index_copy_(0, part.index, getattr(part.group, name))
