"""Pairs of one rank as the kernels take them: matrices of the parameters, state stacked over factors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.lora_rite import RiteGroup, gram
from effkern.ops.lora_rite.group import MAX_RANK, OP
from effkern.ops.lora_rite.stages import choose
from effkern.optim.lora.layout import Layout, RowSums, compute_dtype, layout_of, local_of, mesh_of
from effkern.optim.lora.pairs import LoraPair

# Entries of a parameter's state that are views of stacked tensors, and their shapes and dtypes for one factor.
SMALL = ("whiten", "second", "transport", "escaped", "step", "exact")
_FIELD = {"step": "steps"}


def no_kernel(rank: int, like: Tensor) -> str | None:
    """None if a compiled kernel runs for factors like this one, else why not: then the plain form takes the step."""
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}"
    if compute_dtype(like) != torch.float32:
        return "float64 factors have none"
    if like.device.type == "cpu":
        if registry.choose(OP, "auto", like.device) != "cpp":
            return "the C++ kernels are missing (effkern doctor says why)"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"effkern::{OP}_gram", "CPU"):
            return f"effkern._C was built without {OP}"
    elif choose("auto", like.new_empty(0, dtype=torch.float32), rank) == "plain":
        return f"no kernel of rank {rank} runs on {like.device}"
    return None


@dataclass(eq=False)
class Run:
    """The pairs of one parameter group with the same rank, device and precision."""

    pairs: list[LoraPair]
    layouts: list[Layout]
    """Of A_0, B_0, A_1, B_1 ..."""
    group: RiteGroup
    sums: RowSums | None
    copies: list[tuple[int, Tensor]]
    """(factor, its buffer) where the kernels do not write the parameter itself: master weights, exchanged rows."""
    masters: dict[int, Tensor] = field(default_factory=dict)
    seen: list[tuple[int, int]] = field(default_factory=list)
    """Version and address of each parameter after the last step."""
    zeros: dict[int, Tensor] = field(default_factory=dict)
    """Gradients of frozen factors."""

    def __post_init__(self) -> None:
        self.broken = torch.zeros(len(self.layouts), dtype=torch.bool, device=self.group.whiten.device)
        """[F]: the factor was not finite when its basis was to be made."""
        self.params = [layout.param for layout in self.layouts]
        self.locals = [local_of(layout.param) for layout in self.layouts]
        # Some process has no row of some factor, which the kernels do not take. Then no process may use them: they add
        # up sums in the bases that each has found for itself, and two solvers find the same up to signs alone.
        self.empty = any(x.numel() == 0 for x in self.group.factors)
        if self.sums is not None:
            (self.empty,) = self.sums.anywhere([self.empty])
        # A gradient of such a factor is the matrix that the kernels read, or its transpose.
        self.turned = [(x.rank_dim == 0) != x.wide for x in self.layouts]
        self.direct = all(x.placements is None and x.param.dim() == 2 for x in self.layouts)

    def versions(self) -> list[tuple[int, int]]:
        """What changes when somebody writes to a parameter or gives it other memory (`.data` writes count nowhere)."""
        if not self.direct:
            self.locals = [local_of(layout.param) for layout in self.layouts]
        return [(x._version, x.data_ptr()) for x in self.locals]

    @property
    def impl(self) -> str:
        """Where the kernels cannot go, the plain form of the same steps."""
        return "plain" if self.group.rank > MAX_RANK or self.empty else "auto"


def new_state(layout: Layout, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """State of a factor before its first step."""
    device = local_of(layout.param).device

    def small(*shape: int, of: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(shape, dtype=of, device=device)

    state = {
        "exp_avg": layout.zeros(dtype),
        "whiten": small(rank, rank),
        "second": small(rank),
        "transport": torch.eye(rank, dtype=torch.float64, device=device),
        "escaped": small(),
        "step": small(of=torch.int64),
        "exact": torch.ones((), dtype=torch.int32, device=device),
    }
    if layout.param.dtype != dtype:
        state["master"] = _master(layout, dtype)
    return state


def _master(layout: Layout, dtype: torch.dtype) -> Tensor:
    master = layout.zeros(dtype)
    master.copy_(_on_step_placements(layout))
    return master


def _on_step_placements(layout: Layout) -> Tensor:
    param = layout.param.detach()
    return param.redistribute(placements=layout.placements) if layout.moves else param  # type: ignore[attr-defined]


def make_runs(groups: list[list[LoraPair]], state: Mapping[Tensor, dict[str, Any]]) -> list[tuple[int, Run]]:
    """Runs of all parameter groups, with the number of their group; their state becomes views of stacked tensors.

    `state` is the optimizer's; entries that are missing are made.

    Raises:
        ValueError: a pair over two meshes, or stored state of other shapes.
    """
    keyed: dict[tuple[Any, ...], list[LoraPair]] = {}
    for number, pairs in enumerate(groups):
        for pair in pairs:
            meshes = {mesh_of(x) for x in (pair.A, pair.B)} - {None}
            if len(meshes) > 1:
                raise ValueError(f"{pair.name}: both factors must be on one device mesh, got {meshes}")
            mesh = next(iter(meshes), None)
            key = (number, pair.rank, pair.A.device, compute_dtype(pair.A, pair.B), id(mesh) if meshes else None)
            keyed.setdefault(key, []).append(pair)
    return [(key[0], _make_run(pairs, key[3], key[4] is not None, state)) for key, pairs in keyed.items()]


def _make_run(pairs: list[LoraPair], dtype: torch.dtype, sharded: bool, state: Mapping[Tensor, dict[str, Any]]) -> Run:
    rank = pairs[0].rank
    layouts = []
    for pair in pairs:
        layouts.append(layout_of(f"A of {pair.name}", pair.A, pair.rank_dim_A))
        layouts.append(layout_of(f"B of {pair.name}", pair.B, pair.rank_dim_B))
    factors, moments, copies, masters = [], [], [], {}
    for i, layout in enumerate(layouts):
        own = state[layout.param]
        if "exp_avg" not in own:
            own.update(new_state(layout, rank, dtype))
        elif layout.param.dtype != dtype and "master" not in own:
            own["master"] = _master(layout, dtype)
        if own["exp_avg"].shape != layout.param.shape or own["whiten"].shape != (rank, rank):
            raise ValueError(
                f"state of {pairs[i // 2].name}: exp_avg must have shape {list(layout.param.shape)} and whiten "
                f"{[rank, rank]}, got {list(own['exp_avg'].shape)} and {list(own['whiten'].shape)}"
            )
        if "master" in own:
            buffer = local_of(own["master"])
            masters[i] = own["master"]
        elif layout.moves:
            buffer = local_of(_on_step_placements(layout)).clone()
        else:
            buffer = local_of(layout.param.detach())
        if "master" in own or layout.moves:
            copies.append((i, buffer))
        factors.append(layout.matrix(buffer))
        moments.append(layout.matrix(local_of(own["exp_avg"])))
    stacked: dict[str, Any] = {}
    for name in SMALL:
        whole = torch.stack([state[layout.param][name] for layout in layouts])
        stacked[_FIELD.get(name, name)] = whole
        for i, layout in enumerate(layouts):
            state[layout.param][name] = whole[i]
    rows = torch.tensor([float(x.rows) for x in layouts], dtype=torch.float64, device=factors[0].device)
    group = RiteGroup(factors, [x.wide for x in layouts], moments, rows=rows, **stacked)
    sums = RowSums(layouts, factors) if sharded else None
    return Run(pairs, layouts, group, sums, copies, masters)


def refresh(run: Run, factors: Iterable[int]) -> None:
    """Take the present values of these parameters into the buffers of the run.

    A buffer that rounds to the parameter as it is stays: a write that changes nothing must not round a master.
    """
    chosen = set(factors)
    for i, buffer in run.copies:
        if i in chosen:
            param = local_of(_on_step_placements(run.layouts[i]))
            buffer.copy_(torch.where(buffer.to(param.dtype) == param, buffer, param.to(buffer.dtype)))


def publish(run: Run, factors: Iterable[int]) -> None:
    """Write the buffers of the run to their parameters, rounded to the parameters' dtype."""
    chosen = set(factors)
    rounded = [(i, buffer) for i, buffer in run.copies if i in chosen and not run.layouts[i].moves]
    if rounded:
        torch._foreach_copy_([run.locals[i].detach() for i, _ in rounded], [buffer for _, buffer in rounded])
    for i, buffer in run.copies:
        layout = run.layouts[i]
        if i not in chosen or not layout.moves:
            continue
        from torch.distributed.tensor import DTensor

        whole = DTensor.from_local(
            buffer, mesh_of(layout.param), layout.placements, shape=layout.param.shape, stride=layout.param.stride()
        )
        layout.param.detach().copy_(whole.redistribute(placements=layout.param.placements))  # type: ignore[attr-defined]


def bit_sum(param: Tensor) -> Tensor:
    """Sum over the elements' bits as whole numbers: the same on every device and for every order of summation."""
    whole = {4: torch.int32, 8: torch.int64, 2: torch.int16}[param.element_size()]
    return param.detach().view(whole).sum(dtype=torch.int64)


def fresh_factors(run: Run, impl: str, loaded: Mapping[Tensor, Tensor]) -> list[int]:
    """Factors whose stored basis is not that of their present values: before the first step, and after a load of other
    weights. One float64 Gram matrix each, and one host read.

    loaded: bit sums of the values that the state is of. Where there is none, as for sharded factors, a basis within
        0.05 of orthonormal is taken for that of the present values.
    """
    group = run.group
    grams = gram(group.factors, group.wide, impl=impl)
    grams = grams if run.sums is None else run.sums(group, grams)
    found = group.whiten.mT @ grams @ group.whiten
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    # A column of the basis has length 1, or is empty.
    wanted = (diagonal > 0.5).double()
    off = (found - torch.diag_embed(wanted)).abs().amax((-1, -2))
    empty = group.whiten.abs().amax((-1, -2)) == 0
    present = grams.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
    wrong = ~(off < 0.05) | (empty & present) | (group.steps == 0)
    for i, param in enumerate(run.params):
        if param in loaded:
            wrong[i] |= bit_sum(param) != loaded[param]
    return [i for i, bad in enumerate(wrong.tolist()) if bad]


def stale_masters(run: Run) -> list[int]:
    """Factors whose parameter is not the rounded master, on any process: somebody else has written it."""
    if not run.masters:
        return []
    stale = []
    for i, layout in enumerate(run.layouts):
        if i not in run.masters:
            stale.append(False)
            continue
        param = local_of(_on_step_placements(layout))
        stale.append(not torch.equal(local_of(run.masters[i]).to(param.dtype), param))
    if run.sums is not None:
        stale = run.sums.anywhere(stale)
    return [i for i, it_is in enumerate(stale) if it_is]
