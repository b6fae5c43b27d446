"""All loops as one node of autograd: its backward goes through the loops one by one and sums gradients in float32.

Every loop is a small graph of its own, from detached leaves to its state. It is kept (full) or made again (recompute);
backward is the same code for both. Each tensor that the loops share gets one gradient, rounded once, so that whatever
hooks it has fire once.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from effkern.nn.looped.body import OP, Body, Plan
from effkern.nn.looped.captured import check_captured
from effkern.nn.looped.finite import FiniteFlags
from effkern.nn.looped.held import Held
from effkern.nn.looped.hooks import hooks_aside
from effkern.nn.looped.main_grad import asked_for, check_main_grads, main_grad_of, wide
from effkern.nn.looped.replay import AutocastState, RandomStates, devices_of


class Job(NamedTuple):
    """One call of the block."""

    body: Body
    plan: Plan
    keep: bool
    """Keep the graphs of the loops with gradient, instead of making them again."""
    by_layer: bool
    first: int
    """The first loop with gradient."""
    all_states: bool
    owner: nn.Module
    """Whose parameters are read: the core, and the norm if it is a module."""
    main_grad: bool

    def loop(self, plan: Plan, t: int, carry: Tensor, by_layer: bool = False) -> tuple[Tensor, Tensor]:
        """The state, and not what was made of it, is where a gradient stops, and where the block begins and ends."""
        start, stop = t in (0, self.first), t + 1 in (self.first, len(plan.loops))
        return self.body.loop(plan, t, carry, start=start, stop=stop, by_layer=by_layer)


class Leaves:
    """The tensors of a plan that get gradients, each once, by loop."""

    def __init__(self, plan: Plan) -> None:
        self.tensors: list[Tensor] = []
        self.others: list[Tensor] = []
        places: dict[int, int] = {}

        def places_of(tree: Any) -> tuple[list[Any], Any, list[tuple[int, int]]]:
            flat, spec = tree_flatten(tree)
            found = []
            for i, leaf in enumerate(flat):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    place = places.setdefault(id(leaf), len(places))
                    if place == len(self.tensors):
                        self.tensors.append(leaf)
                    found.append((i, place))
                elif isinstance(leaf, Tensor):
                    self.others.append(leaf)
            return flat, spec, found

        self.shared = places_of(plan.shared)
        self.loops = [places_of(part) for part in plan.loops]

    def of_loop(self, t: int, count: int) -> list[int]:
        """What loops t .. t + count - 1 read."""
        parts = self.loops[t : t + count]
        return list(dict.fromkeys(place for _, _, found in (self.shared, *parts) for _, place in found))

    def replaced(self, tensors: list[Tensor]) -> Plan:
        """The plan with these in place of its own."""

        def put(entry: tuple[list[Any], Any, list[tuple[int, int]]]) -> Any:
            flat, spec, found = entry
            flat = list(flat)
            for i, place in found:
                flat[i] = tensors[place]
            return tree_unflatten(flat, spec)

        return Plan(put(self.shared), [put(part) for part in self.loops])


def run(job: Job, carry: Tensor) -> tuple[Tensor, ...]:
    """The last state, or with `all_states` every one; with gradients where autograd is on and something needs one."""
    leaves = Leaves(job.plan)
    held = Held(job.owner)
    inputs = [carry, *leaves.tensors, *held.trained]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        if job.main_grad:
            check_main_grads(held.trained)
        return _Loops.apply(job, leaves, held, *inputs)
    flags, states = FiniteFlags(job.body.check_finite), []
    for t in range(len(job.plan.loops)):
        state, carry = job.loop(job.plan, t, carry)
        flags.add(state)
        if job.all_states or t + 1 == len(job.plan.loops):
            states.append(state)
    flags.check()
    return tuple(states)


class Kept(NamedTuple):
    """The graph of one loop: where it begins, and its ends, without the memory of their tensors."""

    leaf: Tensor
    state: GradientEdge | None
    """None: it needs no gradient."""
    carry: GradientEdge | None
    """None, too, if it is the state."""

    @classmethod
    def of(cls, leaf: Tensor, state: Tensor, carry: Tensor) -> "Kept":
        ends = [get_gradient_edge(x) if x.requires_grad else None for x in (state, carry)]
        return cls(leaf, ends[0], None if carry is state else ends[1])


class _Loops(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Job, leaves: Leaves, held: Held, start: Tensor, *tensors: Tensor) -> Any:
        body, plan, total = job.body, job.plan, len(job.plan.loops)
        ctx.job, ctx.leaves, ctx.held = job, leaves, held
        ctx.set_materialize_grads(False)
        carry = start
        ctx.autocast = AutocastState(carry.device)
        # What is read again; of kept graphs torch itself looks after the rest.
        again = {} if job.keep else {"arguments": leaves.others, "parameters": held.frozen}
        ctx.versions = [(what, x, x._version) for what, xs in again.items() for x in xs if not x.is_inference()]
        devices = devices_of([carry, *tensors])
        flags, carries, states, random = FiniteFlags(body.check_finite), [], [], []
        ctx.kept = []
        wanted = ctx.needs_input_grad[3]
        if job.keep:
            proxies = [x.detach().requires_grad_() for x in leaves.tensors]
            tracked = leaves.replaced(proxies)
            ctx.proxies = proxies
        for t in range(total):
            if t >= job.first and job.keep:
                leaf = carry.detach().requires_grad_(t > job.first or (t == 0 and wanted))
                with torch.enable_grad():
                    state, carry = job.loop(tracked, t, leaf)
                ctx.kept.append(Kept.of(leaf, state, carry))
                state, carry = state.detach(), carry.detach()
            else:
                if t >= job.first:
                    carries.append(carry)
                    random.append(RandomStates(devices))
                before, version = carry, carry._version
                state, carry = job.loop(plan, t, carry)
                if before._version != version:
                    raise RuntimeError(f"{OP}: core must leave its input as it is, got it changed in place in loop {t}")
            flags.add(state)
            if job.all_states or t + 1 == total:
                states.append(state)
        flags.check()
        if random and random[0].equals(RandomStates(devices)):
            random = []
        if ctx.autocast.enabled and not job.keep:
            # Casts made here have no graph; some releases of torch hand them to whoever reads those weights next.
            torch.clear_autocast_cache()
        ctx.random, ctx.devices = random, devices
        if not job.keep:
            held.hold_buffers()
        # Parameters by reference: a hook of saved tensors that hands out a copy would cut them off.
        ctx.versions += [("parameters", p, p._version) for p in held.trained]
        ctx.save_for_backward(*tensors[: len(leaves.tensors)], *carries)
        # A core may return what it got.
        seen: set[int] = {id(start), *map(id, tensors)}
        outputs = []
        for t, state in enumerate(states):
            if job.all_states and t < job.first:
                # A view of what has a gradient would have one, too.
                outputs.append(state.detach())
                continue
            outputs.append(state.view_as(state) if id(state) in seen else state)
            seen.add(id(state))
        if job.all_states:
            ctx.mark_non_differentiable(*outputs[: job.first])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(f'{OP}: create_graph=True is not covered, mode="autograd" is')
        job: Job = ctx.job
        held: Held = ctx.held
        for what, x, version in ctx.versions:
            if x._version != version:
                raise RuntimeError(f"{OP}: {what} must stay as they are until backward, got one changed in place")
        if not all(p.requires_grad for p in held.trained):
            raise RuntimeError(f"{OP}: parameters must stay as they are until backward, got one frozen since forward")
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        saved = ctx.saved_tensors
        count = len(ctx.leaves.tensors)
        tensors, carries = list(saved[:count]), saved[count:]
        total, by_state = len(job.plan.loops), list(grads)
        if not job.all_states:
            by_state[:0] = [None] * (total - 1)
        sums = Sums(count, held.trained, job.main_grad)
        if job.keep:
            proxies, tracked = ctx.proxies, None
        else:
            proxies = [x.detach().requires_grad_() for x in tensors]
            tracked = ctx.leaves.replaced(proxies)
        following: Tensor | None = None
        # Entered once, so that weights are cast once.
        with ExitStack() as stack:
            stack.enter_context(_random_states_kept(ctx.devices) if ctx.random else nullcontext())
            stack.enter_context(nullcontext() if job.keep else held.again())
            stack.enter_context(ctx.autocast.again())
            stack.enter_context(sums.of_parameters())
            for t in reversed(range(job.first, total)):
                if following is None and by_state[t] is None:
                    continue
                i = t - job.first
                if job.keep:
                    kept = ctx.kept[i]
                    if not keep_graph:
                        ctx.kept[i] = None
                else:
                    assert tracked is not None
                    wanted = t > job.first or (t == 0 and ctx.needs_input_grad[3])
                    leaf = carries[i].detach().requires_grad_(wanted)
                    if ctx.random:
                        ctx.random[i].restore()
                    with torch.enable_grad():
                        kept = Kept.of(leaf, *job.loop(tracked, t, leaf, job.by_layer))
                places = ctx.leaves.of_loop(t, 2)
                with ctx.autocast.off():
                    following = _through(kept, by_state[t], following, proxies, places, held, sums, keep_graph)
                del kept
        return (None, None, None, following if ctx.needs_input_grad[3] else None, *sums.results(tensors))


def _through(
    kept: Kept, grad_state: Tensor | None, grad_carry: Tensor | None, proxies: list[Tensor], places: list[int],
    held: Held, sums: "Sums", keep_graph: bool,
) -> Tensor | None:  # fmt: skip
    """Backward of one loop: adds to `sums`, returns the gradient of what the loop got."""
    if kept.carry is None and grad_carry is not None:
        grad_state = grad_carry if grad_state is None else grad_state + grad_carry
    pairs = [(kept.state, grad_state), (kept.carry, grad_carry)]
    outputs, arriving = [], []
    for end, grad in pairs:
        if end is not None and grad is not None:
            outputs.append(end)
            arriving.append(grad)
    if not outputs:
        return None
    read = [proxies[place] for place in places]
    own = [kept.leaf] if kept.leaf.requires_grad else []
    inputs = [*own, *read, *held.trained]
    # In every loop: a core may read another tensor in each. One that was frozen in forward gets no gradient.
    check_captured(outputs, [*inputs, *held.frozen])
    with sums.from_here(outputs):
        found = torch.autograd.grad(outputs, inputs, arriving, retain_graph=keep_graph, allow_unused=True)
    for place, grad in zip([*places, *range(sums.count, len(sums.totals))], found[len(own) :], strict=True):
        if grad is not None and grad is not sums.stubs.get(place):
            sums.add(place, grad)
    return found[0] if own else None


class Sums:
    """Gradients over loops, in float32 where their tensors are narrower."""

    def __init__(self, count: int, params: list[Tensor], main_grad: bool) -> None:
        self.count, self.params, self.main_grad = count, params, main_grad
        self.totals: list[Tensor | None] = [None] * (count + len(params))
        # Whether the total is ours to write into; the first gradient may be shared with others.
        self.ours = [False] * len(self.totals)
        self.stubs: dict[int, Tensor] = {}
        self.tasks: set[int] = set()
        if main_grad:
            check_main_grads(params)
            for i, p in enumerate(params, count):
                if asked_for(p):
                    self.totals[i], self.ours[i] = main_grad_of(p), True

    def add(self, place: int, grad: Tensor) -> None:
        total = self.totals[place]
        if total is None:
            self.totals[place] = total = grad.to(wide(grad.dtype))
            self.ours[place] = total is not grad
        elif self.ours[place]:
            total.add_(grad)
        else:
            self.totals[place], self.ours[place] = total + grad, True

    def take(self, place: int, grad: Tensor) -> Tensor | None:
        """Adds, and hands on something of no size instead, so that the gradient's memory is free for the next one.

        A gradient that another thread finds for the parameter meanwhile is left as it is, and that of a parameter at
        which the pass begins, as the core returned it.
        """
        if torch._C._current_graph_task_id() not in self.tasks:
            return None
        self.add(place, grad)
        stub = self.stubs.get(place)
        if stub is None:
            stub = self.stubs[place] = grad.new_zeros(()).expand_as(grad)
        return stub

    @contextmanager
    def from_here(self, ends: list[GradientEdge]) -> Iterator[None]:
        """What a backward pass from these finds is ours, on whichever of autograd's threads."""

        def begins(_: Any) -> None:
            self.tasks.add(torch._C._current_graph_task_id())

        handles = [end.node.register_prehook(begins) for end in ends]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def of_parameters(self) -> Iterator[None]:
        """Gradients of parameters are added as soon as they are there, while they are in the cache.

        By hooks, in place of those that the parameters have: theirs are for the one gradient at the end.
        """
        with hooks_aside(self.params):
            handles = [p.register_hook(partial(self.take, i)) for i, p in enumerate(self.params, self.count)]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def results(self, tensors: list[Tensor]) -> list[Tensor | None]:
        """One gradient each, in the tensor's dtype."""
        given = tensors if self.main_grad else [*tensors, *self.params]
        grads = [None if g is None else g.to(x.dtype) for g, x in zip(self.totals, given)]
        return grads + [None] * (len(self.totals) - len(grads))


@contextmanager
def _random_states_kept(devices: list[torch.device]) -> Iterator[None]:
    states = RandomStates(devices)
    try:
        yield
    finally:
        states.restore()
