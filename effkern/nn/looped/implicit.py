"""The fixed point of one loop: the solvers, and the gradient of the fixed point by solving once more.

B rows of the first dimension, N numbers in each, m memory
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.nn.looped.body import OP, Body, Plan
from effkern.nn.looped.engine import Job, run
from effkern.nn.looped.finite import FiniteFlags
from effkern.nn.looped.held import Held
from effkern.nn.looped.main_grad import wide
from effkern.nn.looped.modes import Implicit
from effkern.nn.looped.replay import AutocastState, RandomStates, devices_of

Map = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class SolverReport:
    """How far a solver came."""

    steps: int
    """Evaluations of F."""
    residual: Tensor
    """||F(h) - h|| / ||F(h)|| of the last one, the largest of all rows; 0-d. 0 without any."""
    adjoint: "SolverReport | None" = None
    """Of backward="adjoint", once backward has run: the same of u <- J^T u + g."""


class Solution(NamedTuple):
    """Where a solver stopped."""

    state: Tensor
    report: SolverReport


def fixed_point(job: Job, start: Tensor, how: Implicit) -> tuple[Tensor, SolverReport]:
    """One loop, with gradient, from the fixed point that was solved for without one."""
    body, plan = job.body, job.plan
    with torch.no_grad():
        devices = devices_of([start])
        before, first = RandomStates(devices), [True]
        flags = FiniteFlags(body.check_finite)

        def evaluate(h: Tensor) -> Tensor:
            state = body.loop(plan, 0, h)[0]
            flags.add(state)
            if first and not before.equals(RandomStates(devices)):
                raise ValueError(f"{OP}: core must draw no random numbers with Implicit, got a state of them changed")
            first.clear()
            return state

        solution = solve(evaluate, start.detach(), how.solver, how.steps, how.tol, how.memory, how.ridge)
        flags.check()
    autocast = AutocastState(start.device)
    (state,) = run(job, solution.state)
    if how.backward == "adjoint" and state.requires_grad:
        held = Held(job.owner)
        held.hold_buffers()
        state = _Adjoint.apply(state, solution, body, plan, how, autocast, held)
    return state, solution.report


class _Adjoint(torch.autograd.Function):
    """The identity, whose gradient g becomes the solution u of u = J^T u + g, J = dF/dh at the fixed point."""

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, solved: Solution, body: Body, plan: Plan, how: Implicit, autocast: AutocastState,
        held: Held,
    ) -> Tensor:  # fmt: skip
        ctx.body, ctx.plan, ctx.how, ctx.autocast, ctx.held = body, plan, how, autocast, held
        ctx.report = solved.report
        ctx.save_for_backward(solved.state)
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (solved,) = ctx.saved_tensors
        how: Implicit = ctx.how
        h = solved.detach().requires_grad_()
        autocast = ctx.autocast.again() if ctx.autocast.enabled else nullcontext()
        with torch.enable_grad(), ctx.held.again(), autocast:
            state, _ = ctx.body.loop(ctx.plan, 0, h)
        if not state.requires_grad:
            return grad, None, None, None, None, None, None

        def transposed(u: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(state, h, u, retain_graph=True, allow_unused=True)
            return grad if product is None else grad + product

        steps = how.steps if how.backward_steps is None else how.backward_steps
        tol = how.tol if how.backward_tol is None else how.backward_tol
        solution = solve(transposed, grad, how.solver, steps, tol, how.memory, how.ridge)
        ctx.report.adjoint = solution.report
        return solution.state, None, None, None, None, None, None


def solve(f: Map, start: Tensor, solver: str, steps: int, tol: float, memory: int, ridge: float) -> Solution:
    """h with h = f(h), in the dtype of `start`: the last value of f."""
    if solver == "iterate":
        return _iterate(f, start, steps, tol)
    return _anderson(f, start, steps, tol, memory, ridge)


def _iterate(f: Map, h: Tensor, steps: int, tol: float) -> Solution:
    residual = h.new_zeros((), dtype=wide(h.dtype))
    for step in range(1, steps + 1):
        new = f(h)
        if tol > 0 or step == steps:
            residual = _residual(_rows(new) - _rows(h), _rows(new))
        h = new
        if tol > 0 and bool(residual <= tol):
            break
    return Solution(h, SolverReport(step, residual))


def _anderson(f: Map, start: Tensor, steps: int, tol: float, memory: int, ridge: float) -> Solution:
    """Each row's next iterate mixes its last m values of f: weights a of sum 1, the least ||sum_i a_i (f_i - h_i)||.

    (G G^T + ridge max_i ||g_i||^2) a ~ 1, in float64 from products in float32.
    """
    h = start
    values: list[Tensor] = []
    gaps: list[Tensor] = []
    for step in range(1, steps + 1):
        new = f(h)
        value_BN = _rows(new)
        gap_BN = value_BN - _rows(h)
        residual = _residual(gap_BN, value_BN)
        if step == steps or (tol > 0 and bool(residual <= tol)):
            break
        values, gaps = [*values, value_BN][-memory:], [*gaps, gap_BN][-memory:]
        h = _mixed(values, gaps, ridge).to(start.dtype).view_as(start)
    return Solution(new, SolverReport(step, residual))


def _mixed(values: list[Tensor], gaps: list[Tensor], ridge: float) -> Tensor:
    if len(values) == 1:
        return values[0]
    gram_Bmm = torch.stack([torch.stack([(a * b).sum(-1) for b in gaps], -1) for a in gaps], -2).double()
    largest_B11 = gram_Bmm.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
    # A row that has arrived has no gap left: any weights do.
    largest_B11 = torch.where(largest_B11 > 0, largest_B11, 1.0)
    eye = torch.eye(len(values), dtype=torch.float64, device=gram_Bmm.device)
    weights = torch.linalg.solve_ex(gram_Bmm / largest_B11 + ridge * eye, torch.ones_like(gram_Bmm[..., :1]))[0]
    share_Bm = (weights / weights.sum(-2, keepdim=True)).squeeze(-1).to(values[0].dtype)
    mixed = share_Bm[:, :1] * values[0]
    for i, value in enumerate(values[1:], 1):
        mixed = mixed.addcmul_(share_Bm[:, i : i + 1], value)
    return mixed


def _rows(h: Tensor) -> Tensor:
    """[B, N] in float32 at least."""
    h = h.to(wide(h.dtype))
    return h.flatten(1) if h.dim() > 1 else h.flatten()[None]


def _residual(gap: Tensor, value: Tensor) -> Tensor:
    if not len(value):
        return value.new_zeros(())
    size = value.norm(dim=-1).clamp_min(torch.finfo(value.dtype).tiny)
    return (gap.norm(dim=-1) / size).amax()
