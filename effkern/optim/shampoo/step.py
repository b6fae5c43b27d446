"""One step of a plan: Gram products family by family, roots bucket by bucket, updates family by family."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.ops import shampoo as ops
from effkern.optim.shampoo import blocks, sharded
from effkern.optim.shampoo.failures import ADAMW, GRADIENT, ROOT, UPDATE, Counters
from effkern.optim.shampoo.options import last_root_step, root_is_due
from effkern.optim.shampoo.saved import state_keys
from effkern.optim.shampoo.state import Bucket, Entry, Family, Plan, slot, wide
from effkern.optim.shampoo.update import update_

WEIGHT = "weight"


class Segment(NamedTuple):
    """Blocks [first, last) of a family, whose parameters all have a gradient and are at the same step."""

    family: Family
    first: int
    last: int
    step: int


class Work(NamedTuple):
    """What a step needs beside the plan."""

    group: dict[str, Any]
    live: list[Entry]
    segments: list[Segment]
    root_group: Any
    impl: str


def begin(plan: Plan, group: dict[str, Any], root_group: Any, impl: str) -> Work:
    """Count the step of every parameter that has a gradient."""
    live = [e for e in plan.entries if e.parameter.grad is not None]
    for e in live:
        e.step += 1
    if live:
        torch._foreach_add_([e.state["step"] for e in live], 1)
    present = set(map(id, live))
    return Work(group, live, [s for f in plan.families for s in _segments(f, present)], root_group, impl)


def _segments(family: Family, present: set[int]) -> Iterator[Segment]:
    first = last = step = 0
    for entry, _, start, end in family.places:
        if id(entry) not in present:
            continue
        if start == last and entry.step == step:
            last = end
            continue
        if last > first:
            yield Segment(family, first, last, step)
        first, last, step = start, end, entry.step
    if last > first:
        yield Segment(family, first, last, step)


def _take(s: Segment, of: Callable[[Entry], Tensor], *, gathered: bool = False) -> list[Tensor]:
    """The blocks of a segment, of one tensor of each parameter: its local part, or the whole where `gathered`."""
    found: list[Tensor] = []
    owner, matrix = None, None
    for entry, cut in zip(s.family.owners[s.first : s.last], s.family.cuts[s.first : s.last]):
        if entry is not owner:
            own = of(entry)
            if entry.sharded:
                own = sharded.whole(own) if gathered else sharded.local(own)
            owner, matrix = entry, blocks.as_matrix(own, entry.order)
        assert matrix is not None
        found.append(blocks.take(matrix, cut))
    return found


def _gradients(s: Segment) -> list[Tensor]:
    """Of one dtype, which parameters may leave open (grad_dtype), and not of more digits than the factors have."""

    def of(entry: Entry) -> Tensor:
        assert entry.parameter.grad is not None
        return entry.parameter.grad

    grads = _take(s, of, gathered=s.family.gathered)
    dtypes, most = {g.dtype for g in grads}, wide(s.family.owners[0].parameter.dtype)
    if len(dtypes) > 1 or (torch.float64 in dtypes and most != torch.float64):
        return [g.to(most) for g in grads]
    return grads


def _factors(s: Segment, which: int, name: str) -> Tensor | None:
    """factor, root or failures of the left (0) or right (1) bucket, of this segment's blocks."""
    bucket = (s.family.left, s.family.right)[which]
    if bucket is None:
        return None
    first = (s.family.left_first, s.family.right_first)[which]
    return getattr(bucket, name)[first + s.first : first + s.last]


def _correction(group: dict[str, Any], step: int) -> float:
    """1 - beta2^t of the step t whose roots serve at `step`: (c L)^-a = c^-a L^-a, so that the roots, whose ridge is
    relative, are taken of the factors as they are, and a factor that stays keeps its root to the bit."""
    return _share(group, last_root_step(group["precondition_frequency"], group["start_step"], step))


def _share(group: dict[str, Any], step: int) -> float:
    """The sum of the weights in a factor after `step` steps; 1 where it is not corrected for."""
    if not step or not group["bias_correction"] or group["accumulation"] not in ("ema", "kl"):
        return 1.0
    return 1.0 - group["betas"][1] ** step


def _direction_scale(group: dict[str, Any], s: Segment) -> float:
    """What bias correction makes of L^-a M R^-b."""
    scale = 1.0 / (1.0 - group["betas"][0] ** s.step) if group["bias_correction"] else 1.0
    if s.step < group["start_step"]:
        return scale
    buckets = (s.family.left, s.family.right)
    return scale * _correction(group, s.step) ** sum(b.exponent for b in buckets if b is not None)


def accumulate(work: Work) -> None:
    """L <- decay L + weight G G^T and R <- decay R + weight G^T G; blocks with a gradient that is not finite wait."""
    kind, beta = work.group["accumulation"], work.group["betas"][1]
    decay = 1.0 if kind == "sum" else beta
    weight = 1.0 - beta if kind in ("ema", "kl") else 1.0
    for s in work.segments:
        grads = _gradients(s)
        roots = _factors(s, 0, "root"), _factors(s, 1, "root")
        for which, side in enumerate(("left", "right")):
            factor = _factors(s, which, "factor")
            if factor is None:
                continue
            seen, share = grads, weight
            if kind == "kl":
                # G R^-1 G^T / n = (G R^-1/2) (G R^-1/2)^T / n, with the roots of the step before.
                other, bucket = roots[1 - which], (s.family.right, s.family.left)[which]
                assert other is not None
                assert bucket is not None
                stack = torch.stack(grads).to(other.dtype)
                seen = list((stack @ other if which == 0 else other @ stack).unbind())
                share = weight / (s.family.n if which == 0 else s.family.m)
                share *= _correction(work.group, s.step - 1) ** (2 * bucket.exponent)
            bad = s.family.bad[which, s.first : s.last]
            if s.family.layout is not None and s.family.layout.kind == "reduce":
                _accumulate_shards(s, factor, seen, side, decay, share, bad, work.impl)
            else:
                ops.gram_ema_(factor, seen, side=side, decay=decay, weight=share, failures=bad, impl=work.impl)


def _accumulate_shards(
    s: Segment, factor: Tensor, grads: list[Tensor], side: str, decay: float, weight: float, bad: Tensor, impl: str
) -> None:
    """The same where every process holds some rows (columns) of each gradient: their Gram products add up."""
    total = torch.zeros_like(factor)
    own = torch.zeros_like(bad)
    if grads[0].numel():
        ops.gram_ema_(total, grads, side=side, decay=0.0, weight=1.0, failures=own, impl=impl)
    nan = torch.full((), torch.nan, dtype=total.dtype, device=total.device)
    # What one process refused must reach all others.
    total[:, 0, 0] = torch.where(own > 0, nan, total[:, 0, 0])
    sharded.add_up(total, s.family.layout)
    good = total.diagonal(dim1=1, dim2=2).isfinite().all(dim=1)
    factor.copy_(torch.where(good[:, None, None], decay * factor + weight * total, factor))
    bad.copy_(torch.where(good, torch.zeros_like(bad), bad + 1))


def refresh(work: Work) -> None:
    """Take the roots that are due, and those that were while there was no factor."""
    group = work.group
    due: dict[Bucket, list[tuple[int, int]]] = {}
    for s in work.segments:
        now = root_is_due(group["precondition_frequency"], group["start_step"], s.step)
        for bucket, offset in ((s.family.left, s.family.left_first), (s.family.right, s.family.right_first)):
            if bucket is None:
                continue
            first, last = offset + s.first, offset + s.last
            if now:
                due.setdefault(bucket, []).append((first, last))
            elif bucket.late:
                # The update corrects for the step at which the root was due.
                scale = _correction(group, s.step) / _share(group, s.step)
                for start, end in _joined([(i, i + 1) for i in bucket.ready(first, last)]):
                    _take_roots(bucket, start, end, work, scale)
    for bucket, spans in due.items():
        for first, last in _joined(spans):
            _take_roots(bucket, first, last, work)


def _joined(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    if not spans:
        return
    spans.sort()
    first, last = spans[0]
    for start, end in spans[1:]:
        if start > last:
            yield first, last
            first = start
        last = end
    yield first, last


def _take_roots(bucket: Bucket, first: int, last: int, work: Work, scale: float = 1.0) -> None:
    group = work.group
    root, failures = bucket.root[first:last], bucket.failures[first:last]
    low, high = sharded.share_of(last - first, work.root_group)
    # The other methods end at some 1e-3, which is not what float64 is chosen for.
    exact = group["root_method"] == "auto" and root.dtype == torch.float64
    method = "eigh" if exact else group["root_method"]
    if high > low:
        mine = root[low:high]
        ops.inverse_root(
            bucket.factor[first + low : first + high],
            exponent=-bucket.exponent,
            ridge=group["ridge"],
            scale=scale,
            pseudo_inverse=group["pseudo_inverse"],
            method=method,
            out=mine,
            failures=failures[low:high],
            impl=work.impl,
        )
    if work.root_group is not None:
        sharded.gather_shares(root, work.root_group)
        sharded.gather_shares(failures, work.root_group)
    bucket.note(first, last)


def update(work: Work) -> None:
    """Momentum, direction, grafting, decay and weights."""
    for s in work.segments:
        if s.family.gathered:
            _update_gathered(work, s)
        else:
            _update(work, s, lambda e, key: e.parameter.detach() if key == WEIGHT else e.state[key])


def _update_gathered(work: Work, s: Segment) -> None:
    """Bring the whole matrices together, step them on every process, keep the own part."""
    layout = s.family.layout
    assert layout is not None
    full: dict[tuple[Entry, str], tuple[Tensor, Tensor]] = {}
    for e in dict.fromkeys(s.family.owners[s.first : s.last]):
        for key in (WEIGHT, *state_keys(work.group)):
            own = e.parameter.detach() if key == WEIGHT else slot(e, key, wide(e.parameter.dtype))
            full[e, key] = own, sharded.whole(own).clone()
    _update(work, s, lambda e, key: full[e, key][1])
    for own, whole in full.values():
        sharded.put_back(whole, own, layout)


def _update(work: Work, s: Segment, tensor: Callable[[Entry, str], Tensor]) -> None:
    """`tensor` gives weight or state of a parameter, local or whole."""
    group, family = work.group, s.family
    stacks: dict[str, list[Tensor]] = {}
    for key in (WEIGHT, *state_keys(group)):
        if key != WEIGHT and not family.gathered:
            for e in dict.fromkeys(family.owners[s.first : s.last]):
                slot(e, key, wide(e.parameter.dtype))
        stacks[key] = _take(s, lambda e, key=key: tensor(e, key))  # type: ignore[misc]
    grads, begun = _gradients(s), s.step >= group["start_step"]
    shared = family.layout is not None and not family.gathered
    bad = family.bad[:, s.first : s.last]
    if begun and not shared and group["grafting"] in ("none", "rms"):
        _apply(group, s, stacks, grads, bad[2], work.impl)
        return
    update_(
        group, stacks[WEIGHT], grads, stacks.get("momentum"), stacks.get("second_moment"),
        (_factors(s, 0, "root"), _factors(s, 1, "root")) if begun else (None, None),
        (bad[:2] > 0).any(dim=0), s.step, _direction_scale(group, s), (family.m, family.n),
        lambda t: sharded.add_up(t, family.layout),
    )  # fmt: skip


def _apply(
    group: dict[str, Any], s: Segment, stacks: dict[str, list[Tensor]], grads: list[Tensor], bad: Tensor, impl: str
) -> None:
    """The common case, in one op. Bias correction is a factor of the learning rate, but not of decay."""
    beta = group["betas"][0]
    rms = group["grafting"] == "rms"
    scale = 1.0 if rms else _direction_scale(group, s)
    ops.apply_(
        stacks[WEIGHT], grads, _factors(s, 0, "root"), _factors(s, 1, "root"),
        lr=group["lr"] if scale == 1.0 else group["lr"] * scale,
        momenta=stacks.get("momentum"),
        momentum_decay=beta,
        momentum_weight=1.0 - beta,
        weight_decay=group["weight_decay"] / scale,
        norm=group["graft_scale"] * (s.family.m * s.family.n) ** 0.5 if rms else None,
        failures=bad,
        impl=impl,
    )  # fmt: skip


def touch(work: Work) -> None:
    """Tell autograd what was written: ops that take lists of views do not."""
    written = [e.parameter for e in work.live]
    written += [e.state[key] for e in work.live for key in state_keys(work.group)]
    for f in dict.fromkeys(s.family for s in work.segments):
        written += [t for b in (f.left, f.right) if b is not None for t in (b.factor, b.root)]
    torch.autograd.graph.increment_version(written)


def counters(plan: Plan) -> Counters:
    """For Watch: gradients and updates of each family, roots of each bucket, gradients of AdamW."""
    found: Counters = [(ADAMW, some.names, some.bad) for some in plan.plain]
    for f in plan.families:
        names, gradient = [e.name for e in f.owners], f.bad[:2].amax(dim=0)
        found += [(GRADIENT, names, gradient), (UPDATE, names, torch.where(gradient > 0, 0, f.bad[2]))]
    return found + [(ROOT, b.names, b.failures) for b in plan.buckets]
