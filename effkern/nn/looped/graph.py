"""Loops as replays of two recorded bodies: one loop forward, and one loop again with its backward.

Both read and write static buffers alone, so that a recording serves every number of loops. With full storage that
could not be: the second replay would overwrite what the first has saved. What is recorded, and by what, is behind
`Recorder`; CUDA graphs are one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from effkern.nn.looped.block import LoopedBlock
from effkern.nn.looped.body import OP as BLOCK
from effkern.nn.looped.body import Body, Plan
from effkern.nn.looped.captured import check_captured
from effkern.nn.looped.finite import FiniteFlags
from effkern.nn.looped.hooks import hooks_aside
from effkern.nn.looped.main_grad import asked_for, check_main_grads, main_grad_of, wide
from effkern.nn.looped.modes import RECOMPUTE
from effkern.nn.looped.replay import AutocastState, RandomStates, devices_of

OP = "GraphedLoops"


class Recorder(Protocol):
    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """Run `body`, any number of times, and return what does the same work again on the same memory."""


class CudaRecorder:
    """CUDA graphs; bodies of one recorder share a memory pool, as they never run at once."""

    def __init__(self) -> None:
        self.pool: Any = None

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            # Libraries choose kernels and workspaces in their first calls.
            for _ in range(3):
                body()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            body()
        self.pool = graph.pool()
        return graph.replay


class GraphedLoops(nn.Module):
    """The block, each of its loops a replay: no launch overhead, and no recording for another number of loops.

    Called like the block, in its mode "recompute" (exact; L S + k M bytes). Records at the first call for each shape,
    dtype, autocast state and structure of the arguments, for what trains and what is frozen, and for train() and
    eval() of every module; keep those few. Parameters are read where they were at that call: an optimizer that works in
    place suits, moving the module does not. Calls share the buffers of a recording: from one thread, on one stream.

    Args:
        block: in mode "recompute", without loop_argument and without a sampler's with_gradient; its core draws no
            random numbers and keeps control flow on the host out.
        recorder: None: CUDA graphs.

    Raises:
        NotImplementedError: the core draws random numbers, the block has another mode, loop_argument or with_gradient,
            or per_layer holds no tensors.
        ValueError: the core reads a tensor with a gradient from around it.
        RuntimeError: a parameter or buffer has moved, or is another one (a functional call), since the recording.
    """

    def __init__(self, block: LoopedBlock, recorder: Recorder | None = None) -> None:
        super().__init__()
        self.block = block
        self._check_block()
        self.recorder = recorder if recorder is not None else CudaRecorder()
        self._recorded: dict[Any, _Recorded] = {}

    def forward(
        self, x: Tensor, *args: Any, loops: int | None = None, step: int | None = None, state: Tensor | None = None,
        time_steps: Any = None, per_layer: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """h_L; see LoopedBlock.forward."""
        self._check_block()
        block = self.block
        count = block._count(loops, step)
        start = block._first_state(x, state)
        plan = block._plan(x, args, kwargs, count, time_steps, per_layer)
        plan = Plan(plan.shared, [_numbers_to_tensors(part, x) for part in plan.loops])
        layout = _Layout.of(plan)
        autocast = AutocastState(x.device)
        trains = tuple(p.requires_grad for p in block.parameters())
        training = tuple(module.training for module in block.modules())
        key = (x.shape, x.dtype, x.device, tuple(autocast.kinds), trains, training, layout.key(plan))
        recorded = self._recorded.get(key)
        if recorded is None:
            body = block._body(plan)._replace(carries_state=True)
            recorded = _Recorded(block, body, plan, layout, start, autocast, self.recorder)
            self._recorded[key] = recorded
        recorded.check_in_place()
        if block.main_grad:
            check_main_grads(recorded.params)
        shared, rows = layout.tensors(plan)
        flat_rows = [x for row in rows for x in row]
        # Without a graph nothing is kept.
        where = (recorded, count, len(shared), torch.is_grad_enabled())
        return _Replays.apply(*where, start, *shared, *flat_rows, *recorded.params)

    def _check_block(self) -> None:
        block = self.block
        for name, value, plain in (
            ("loop_argument", block.loop_argument, None),
            ("mode", block.mode, RECOMPUTE),
            ("with_gradient of its sampler", getattr(block.loops, "with_gradient", None), None),
        ):
            if value != plain:
                rule = f"no {name}" if plain is None else f"{name} {plain!r}"
                raise NotImplementedError(f"{OP}: block must have {rule}, got {value!r}")


class _Layout(NamedTuple):
    """Where tensors are in a plan: of what all loops share, and of one loop."""

    shared: list[int]
    part: list[int]

    @classmethod
    def of(cls, plan: Plan) -> "_Layout":
        return cls(_tensor_places(plan.shared), _tensor_places(plan.loops[0]))

    def tensors(self, plan: Plan) -> tuple[list[Tensor], list[list[Tensor]]]:
        flat = tree_flatten(plan.shared)[0]
        parts = [tree_flatten(part)[0] for part in plan.loops]
        return [flat[i] for i in self.shared], [[part[i] for i in self.part] for part in parts]

    def key(self, plan: Plan) -> Any:
        """All that a recording has built in."""
        flat, spec = tree_flatten(plan.shared)
        facts: list[Any] = [str(spec), *_facts(flat)]
        first, first_spec = tree_flatten(plan.loops[0])
        for part in plan.loops[1:]:
            other, other_spec = tree_flatten(part)
            if other_spec != first_spec or _facts(other) != _facts(first):
                raise NotImplementedError(f"{OP}: per_layer must hold tensors of one shape in all loops, got others")
        return (*facts, str(first_spec), *_facts(first))

    def filled(self, plan: Plan, shared: list[Tensor], row: list[Tensor]) -> Plan:
        """A plan of one loop with these tensors."""
        return Plan(_put(plan.shared, self.shared, shared), [_put(plan.loops[0], self.part, row)])


class _Recorded:
    """Static buffers and the two recordings over them."""

    def __init__(
        self, block: LoopedBlock, body: Body, plan: Plan, layout: _Layout, start: Tensor, autocast: AutocastState,
        recorder: Recorder,
    ) -> None:  # fmt: skip
        self.block, self.body, self.recorder, self.autocast = block, body, recorder, autocast
        # A cast that was cached before the recording would never be made again.
        autocast.cache = False
        owner = block._owner()
        self.params = [p for p in owner.parameters() if p.requires_grad]
        self.owner, self.every = owner, _tensors_of(owner)
        self.addresses = [p.data_ptr() for p in self.every]
        shared, rows = layout.tensors(plan)
        self.shared, self.row = _static(shared), _static(rows[0])
        self.state, self.grad = start.detach().clone(), torch.empty_like(start)
        self.plan = layout.filled(plan, self.shared, self.row)
        self.read = [x for x in (*self.shared, *self.row) if x.requires_grad]
        # Gradients of a loop's own tensors are taken away after every replay, the others' sum up.
        summed = [*(x for x in self.shared if x.requires_grad), *self.params]
        self.sums = [torch.zeros_like(x, dtype=wide(x.dtype)) for x in summed]
        self.row_grads = [torch.zeros_like(x) for x in self.row if x.requires_grad]
        self._refuse_randomness(start)
        # Streams and graphs are of the current device, which need not be that of the block.
        with torch.cuda.device_of(start):
            self.forward = recorder.record(self._forward)
        self.backward: Callable[[], None] | None = None

    def _forward(self) -> None:
        with torch.no_grad(), self.autocast.again():
            self.state.copy_(self.body.loop(self.plan, 0, self.state)[0])

    def _backward(self) -> None:
        """From `state` (what the loop got) and `grad` (of what it gave): `grad` of what it got, and the sums."""
        leaf = self.state.detach().requires_grad_()
        with torch.enable_grad(), self.autocast.again():
            state = self.body.loop(self.plan, 0, leaf)[0]
            inputs = [leaf, *self.read, *self.params]
            check_captured([get_gradient_edge(state)] if state.requires_grad else [], [*inputs, *self.every])
            with self.autocast.off(), hooks_aside(self.params):
                found = torch.autograd.grad(state, inputs, self.grad, allow_unused=True)
        num_shared, num_rows = len(self.read) - len(self.row_grads), len(self.row_grads)
        for target, g in zip(self.row_grads, found[1 + num_shared : 1 + num_shared + num_rows]):
            target.zero_() if g is None else target.copy_(g)
        for total, g in zip(self.sums, (*found[1 : 1 + num_shared], *found[1 + num_shared + num_rows :])):
            if g is not None:
                total.add_(g)
        self.grad.zero_() if found[0] is None else self.grad.copy_(found[0])

    def record_backward(self) -> Callable[[], None]:
        if self.backward is None:
            with torch.cuda.device_of(self.state):
                self.backward = self.recorder.record(self._backward)
        return self.backward

    def _refuse_randomness(self, start: Tensor) -> None:
        devices = devices_of([start])
        before = RandomStates(devices)
        self._forward()
        if not before.equals(RandomStates(devices)):
            before.restore()
            raise NotImplementedError(f"{OP}: core must draw no random numbers, got a state of them changed")

    def check_in_place(self) -> None:
        now = _tensors_of(self.owner)
        same = len(now) == len(self.every) and all(x is y for x, y in zip(now, self.every))
        if not same or any(x.data_ptr() != address for x, address in zip(now, self.addresses)):
            raise RuntimeError(f"{OP}: parameters must stay where they were recorded, got one moved")


class _Replays(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recorded: _Recorded, loops: int, num_shared: int, graph: bool, start: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.recorded, ctx.loops, ctx.num_shared = recorded, loops, num_shared
        width, own = len(recorded.row), tensors[: len(tensors) - len(recorded.params)]
        shared, rows = own[:num_shared], own[num_shared:]
        needed = graph and any(ctx.needs_input_grad)
        flags, carries = FiniteFlags(recorded.block.check_finite), []
        _copy(recorded.shared, shared)
        recorded.state.copy_(start)
        for t in range(loops):
            if needed:
                carries.append(recorded.state.clone())
            _copy(recorded.row, rows[t * width : (t + 1) * width])
            recorded.forward()
            flags.add(recorded.state)
        flags.check()
        ctx.save_for_backward(*own, *carries)
        return recorded.state.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(f"{OP}: create_graph=True is not covered, {BLOCK} with mode='autograd' is")
        recorded: _Recorded = ctx.recorded
        recorded.check_in_place()
        width, loops, num_shared = len(recorded.row), ctx.loops, ctx.num_shared
        saved = ctx.saved_tensors
        own, carries = saved[: len(saved) - loops], saved[len(saved) - loops :]
        shared, rows = own[:num_shared], own[num_shared:]
        _copy(recorded.shared, shared)
        # Recording runs the body, on whatever the buffers hold; what they must hold comes after it.
        replay = recorded.record_backward()
        torch._foreach_zero_(recorded.sums) if recorded.sums else None
        recorded.grad.copy_(grad)
        row_grads: list[list[Tensor]] = []
        for t in reversed(range(loops)):
            recorded.state.copy_(carries[t])
            _copy(recorded.row, rows[t * width : (t + 1) * width])
            replay()
            row_grads.append([g.clone() for g in recorded.row_grads])
        count = sum(x.requires_grad for x in recorded.shared)
        results = [_spread(recorded.shared, recorded.sums[:count])]
        results += [_spread(recorded.row, grads) for grads in reversed(row_grads)]
        flat = [g for grads in results for g in grads]
        if recorded.block.main_grad:
            check_main_grads(recorded.params)
        for p, total in zip(recorded.params, recorded.sums[count:]):
            if recorded.block.main_grad and asked_for(p):
                main_grad_of(p).add_(total)
            flat.append(None if recorded.block.main_grad else total.to(p.dtype, copy=True))
        return (None, None, None, None, recorded.grad.clone() if ctx.needs_input_grad[4] else None, *flat)


def _spread(tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor | None]:
    """One entry for each tensor, None where it gets no gradient."""
    rest = iter(grads)
    return [next(rest).to(x.dtype, copy=True) if x.requires_grad else None for x in tensors]


def _static(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]


@torch.no_grad()
def _copy(targets: list[Tensor], sources: Any) -> None:
    for target, source in zip(targets, sources):
        target.detach().copy_(source)


def _tensors_of(owner: nn.Module) -> list[Tensor]:
    """What a recording reads at its address."""
    return [*owner.parameters(), *owner.buffers()]


def _tensor_places(tree: Any) -> list[int]:
    return [i for i, leaf in enumerate(tree_flatten(tree)[0]) if isinstance(leaf, Tensor)]


def _facts(leaves: list[Any]) -> list[Any]:
    return [
        (tuple(x.shape), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x for x in leaves
    ]  # fmt: skip


def _put(tree: Any, places: list[int], tensors: list[Tensor]) -> Any:
    flat, spec = tree_flatten(tree)
    flat = list(flat)
    for i, x in zip(places, tensors):
        flat[i] = x
    return tree_unflatten(flat, spec)


def _numbers_to_tensors(part: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """Numbers that depend on how many loops there are must not be built into a recording."""
    numbers = {k: v for k, v in part.items() if isinstance(v, float)}
    return {**part, **{k: torch.tensor(v, dtype=wide(like.dtype), device=like.device) for k, v in numbers.items()}}
