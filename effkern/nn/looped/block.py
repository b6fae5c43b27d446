"""`LoopedBlock`: a core applied L times, with what lies between the loops, trained through exactly and cheaply."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effkern.nn.looped import checks, modes, parts
from effkern.nn.looped.body import OP, Body, LoopPart, Plan
from effkern.nn.looped.by_autograd import by_autograd, has_fsdp_inside
from effkern.nn.looped.checks import check_loops, check_time_steps, require
from effkern.nn.looped.engine import Job, run
from effkern.nn.looped.finite import FiniteFlags
from effkern.nn.looped.implicit import SolverReport, fixed_point
from effkern.nn.looped.modes import Implicit, Mode, Truncated
from effkern.nn.looped.sampling import Sampler
from effkern.nn.looped.state import LoopState


class LoopedBlock(nn.Module):
    """h_{t+1} = norm(residual(core(x_t), h_t)), x_t = injection(h_t, e) + c_t, for t = 0 .. L-1; returns h_L.

    e is the block's input x. Every part besides the core is optional; without any, h_{t+1} = core(h_t). What lies
    between two loops is one pass over memory, effkern.loop_step. h has x's dtype and shape in every loop.

    Args:
        core: a module that maps [..., D] to the same shape, or a list of layers, applied in turn.
        loops: L, or UniformLoops / PoissonLognormalLoops: then a training call needs its `step`, and draws L from it
            and `seed`. Their with_gradient holds in train() for every mode named by a string, also where a call gives
            its `loops`.
        dim: D. Needed by parts with parameters; the rest does without.
        mode: what is kept for backward, see below.
        init: h_0. "input" x, "zeros", "learned" a vector, "noise" truncated normal as Huginn.
        injection: x_t. "none" h; "add" h + e; "linear" W [h; e], with W's half of e once a call; "gate" a h + b e with
            D-wide a and b; "convex" g h + (1 - g) e, g = sigmoid of a D-wide vector.
        residual: "none" f; "laurel" alpha f + beta h + (h A) B, of rank `rank` (0: without A and B), at the start f;
            "euler" h + dt (f - h) with dt = 1/L, 1/substeps, or the call's time_steps.
        per_channel: alpha and beta of LAuReL have D entries.
        conditioning: c_t. "none"; "table" a learned row a loop, max_loops of them; "sinusoidal" a linear map of sines
            of t; "time" a small network of (t, dt), dt = 1/L or the call's time_steps. 0 at the start.
        max_loops: of tables.
        layer_scalars: a float32 table a_{t,i} for loop t and layer i, 1 at the start. "increment" scales what a layer
            adds, z + a (layer(z) - z); "stream" has two, layer(a z + b e), b 0 at the start, as nanochat's per-depth
            scalars; "argument" passes the entry to the layer as `scale`.
        norm: RMSNorm with a weight after every loop; or a module, for example the model's own last norm.
        norm_eps: of that RMSNorm.
        check_finite: look at every state, and raise naming the first loop whose state is not finite. One read of
            flags after the last loop; it waits for the device.
        main_grad: add the gradients of the core, and of a norm that is a module, to `p.main_grad` (float32, for float64
            float64; made if absent) and leave `p.grad` alone; the block's own parameters, norm=True's weight among
            them, get theirs as usual. For trainers that reduce and use it themselves: no hook of DDP or FSDP fires for
            those parameters. Not in mode "autograd", and where FSDP inside or a compiler needs torch's own graph.
        loop_argument: name under which the core gets the number of the loop, an int.
        seed: of drawn numbers of loops.
        device, dtype: of the block's own parameters. Factors of whole tensors stay float32.

    Modes, with S bytes of a state, M of what one of k layers saves, T the time of one loop forward, backward 2 T:
        "recompute"        L S + k M       4 L T   the default: each loop again in backward
        "full"             L k M           3 L T
        "recompute_layer"  L S + k S + M   5 L T   each layer of a loop again, too
        Truncated(t)       t S + k M       (L + 3 t) T   gradient through the last t loops
        Implicit(...)      the fixed point; `loops` are not used
        "autograd"         L k M           3 L T   torch's own graph: second derivatives, and tracing as a whole
    In all but the last, backward is one node that sums the gradients of shared tensors over loops in float32, rounds
    once, and gives each parameter one gradient: one reduction a parameter under DDP. full and recompute give the same
    bits. Dropout and autocast are replayed exactly. Tensors that get a gradient must be arguments or parameters:
    another one that the core reads is found in backward, in whichever loop, and refused. Compile the core, not the
    block: then no L compiles anything.

    As with torch's checkpoint, what runs again in backward runs as a forward does: the buffers that a core writes, as
    running statistics of BatchNorm, are updated once more ("full" updates them once a loop); and a core that draws
    random numbers has the default generators set back to each loop's state for the time of its backward, which threads
    that draw from them meanwhile would see.

    FSDP2: fully_shard the block; its parameters are gathered once forward and once backward, whatever L. If the core or
    its layers are units of their own, "recompute" falls back to torch's checkpoint per loop, "full" to "autograd".

    Raises:
        ValueError, TypeError: an argument breaks a rule.
        RuntimeError: in backward, if parameters or arguments were changed in place or frozen since forward.
    """

    def __init__(
        self,
        core: nn.Module | Sequence[nn.Module],
        loops: int | Sampler,
        *,
        dim: int | None = None,
        mode: Mode = modes.RECOMPUTE,
        init: str = "input",
        injection: str = "none",
        residual: str = "none",
        rank: int = 32,
        per_channel: bool = False,
        substeps: int | None = None,
        conditioning: str = "none",
        max_loops: int | None = None,
        layer_scalars: str = "none",
        norm: bool | nn.Module = False,
        norm_eps: float = 1e-6,
        check_finite: bool = False,
        main_grad: bool = False,
        loop_argument: str | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layered = isinstance(core, (list, tuple, nn.ModuleList))
        if not layered and not isinstance(core, nn.Module):
            raise TypeError(f"{OP}: core must be a module or a list of layers, got {type(core).__name__}")
        layers: list[Any] = list(core) if isinstance(core, (list, tuple, nn.ModuleList)) else [core]
        require("core", f"{len(layers)} layers", bool(layers), "have at least one layer")
        modes.check_mode(mode, OP)
        if not isinstance(loops, Sampler):
            check_loops(loops)
        kinds = {
            "init": init, "injection": injection, "residual": residual, "conditioning": conditioning,
            "layer_scalars": layer_scalars,
        }  # fmt: skip
        checks.check_kinds(kinds)
        if max_loops is not None:
            require("max_loops", max_loops, type(max_loops) is int and max_loops >= 1, "be at least 1")
        checks.check_limits(loops, max_loops, mode)
        checks.check_norm(norm, norm_eps)
        checks.check_sizes(kinds, dim, rank, substeps, max_loops, layered, norm is True)
        if mode == modes.RECOMPUTE_LAYER:
            require("mode", mode, layered, "come with a list of layers as core")
        self.core: nn.Module = nn.ModuleList(layers) if layered else layers[0]
        self.layered, self.loops, self.dim, self.mode, self.seed = layered, loops, dim, mode, seed
        self.max_loops, self.substeps = max_loops, substeps
        self.norm_eps, self.check_finite, self.main_grad, self.loop_argument = (
            norm_eps, check_finite, main_grad, loop_argument,
        )  # fmt: skip
        self.start_state = parts.Start(init, dim, device, dtype)
        self.injection = parts.Injection(injection, dim, device, dtype)
        self.residual = parts.Residual(residual, dim, rank, per_channel, device, dtype)
        self.conditioning = parts.Conditioning(conditioning, dim, max_loops, device, dtype)
        self.layer_scalars = parts.LayerScalars(layer_scalars, max_loops, len(layers), device)
        self.norm: nn.Module | None = norm if isinstance(norm, nn.Module) else None
        if norm is True:
            assert dim is not None
            self.norm = parts.LoopNorm(dim, device, dtype)
        self.last_solution: SolverReport | None = None
        """Of the last call with Implicit: evaluations and residual, and those of its backward with "adjoint"."""

    def draw_loops(self, step: int) -> int:
        """L of a training step, where loops are drawn."""
        if not isinstance(self.loops, Sampler):
            raise ValueError(f"{OP}: loops must be a sampler to be drawn, got {self.loops!r}")
        return self.loops.draw(step, self.seed)

    def forward(
        self,
        x: Tensor,
        *args: Any,
        loops: int | None = None,
        mode: Mode | None = None,
        step: int | None = None,
        state: Tensor | None = None,
        time_steps: Sequence[float] | None = None,
        per_layer: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """h_L.

        Args:
            x: [..., D], floating.
            args, kwargs: for the core, or for every layer: the same in every loop. Tensors in nested tuples, lists and
                dicts get gradients.
            loops, mode: of this call, instead of the block's.
            step: of training, for drawn loops. Without one, in evaluation, the sampler's `in_evaluation` loops run.
            state: h_0, instead of `init`.
            time_steps: dt of every loop, positive with sum 1, for conditioning="time" and residual="euler".
            per_layer: keyword arguments that differ: name -> value, value[t][i] is for layer i in loop t; a tensor
                [loops, layers, ...] is as good as nested lists.

        Returns:
            h_L, like x.

        Raises:
            ValueError, TypeError: an argument breaks a rule; the core returns several things, or another shape.
            FloatingPointError: with check_finite, a state is not finite.
            NotImplementedError: a second derivative outside of mode="autograd".
        """
        return self._execute(x, args, kwargs, loops, mode, step, state, time_steps, per_layer, False)[-1]

    def all_states(
        self,
        x: Tensor,
        *args: Any,
        loops: int | None = None,
        mode: Mode | None = None,
        step: int | None = None,
        state: Tensor | None = None,
        time_steps: Sequence[float] | None = None,
        per_layer: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """h_1 .. h_L, for losses at every loop; arguments as in forward.

        A loss on the last states only costs a backward through all loops; one on a state costs nothing more. With
        Truncated the states before the last t have no gradient. Not for Implicit.
        """
        return self._execute(x, args, kwargs, loops, mode, step, state, time_steps, per_layer, True)

    def start(self, x: Tensor, state: Tensor | None = None) -> LoopState:
        """h_0, for callers that go loop by loop: tests for an exit, rows that leave early."""
        return LoopState(self._first_state(x, state), x, 0)

    def advance(
        self,
        at: LoopState,
        *args: Any,
        loops: int | None = None,
        time_steps: Sequence[float] | None = None,
        per_layer: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LoopState:
        """One more loop, with autograd's own graph if any.

        loops: those there will be at most, for tables and dt. None: the block's, of a sampler its `in_evaluation`. With
        check_finite every call waits for the device. With main_grad only without gradient.
        """
        if loops is None and isinstance(self.loops, Sampler):
            loops = self.loops.in_evaluation
        count = self._count(loops, None)
        if at.loop >= count:
            raise ValueError(f"{OP}: loops must be more than the {at.loop} done, got {count}")
        plan = self._plan(at.source, args, kwargs, count, time_steps, per_layer)
        body = self._body(plan)
        x_t = body.enter(plan, at.loop, at.state)
        f = body.apply_core(plan, at.loop, x_t)
        step = body.leave(plan, at.loop, f, at.state, change=True)
        if step.state.requires_grad:
            self._refuse_main_grad(self._owner())
        flags = FiniteFlags(self.check_finite, at.loop)
        flags.add(step.state)
        flags.check()
        return LoopState(step.state, at.source, at.loop + 1, step.change)

    def _execute(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], loops: int | None, mode: Mode | None,
        step: int | None, state: Tensor | None, time_steps: Sequence[float] | None, per_layer: dict[str, Any] | None,
        all_states: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        mode = self.mode if mode is None else mode
        modes.check_mode(mode, OP)
        if mode == modes.RECOMPUTE_LAYER:
            require("mode", mode, self.layered, "come with a list of layers as core")
        if isinstance(mode, Implicit):
            self._check_implicit(all_states, loops, time_steps, per_layer)
            count = 1
        else:
            count = self._count(loops, step)
        if isinstance(mode, Truncated) and mode.loops > count:
            raise ValueError(f"{OP}: Truncated.loops must be at most the loops of the call, {count}, got {mode.loops}")
        h = self._first_state(x, state)
        plan = self._plan(x, args, kwargs, count, time_steps, per_layer)
        body = self._body(plan)
        owner = self._owner()
        if isinstance(mode, Implicit):
            if torch.compiler.is_compiling() or has_fsdp_inside(self.core):
                raise NotImplementedError(f"{OP}: Implicit needs an eager block whose core is no unit of FSDP")
            body = body._replace(carries_state=True)
            job = Job(body, plan, False, False, 0, False, owner, self.main_grad)
            fixed, self.last_solution = fixed_point(job, h, mode)
            return (fixed,)
        first = count - mode.loops if isinstance(mode, Truncated) else self._first_with_gradient(count)
        keep = mode == modes.FULL or (isinstance(mode, Truncated) and not mode.recompute)
        job = Job(body, plan, keep, mode == modes.RECOMPUTE_LAYER, first, all_states, owner, self.main_grad)
        outside = mode == modes.AUTOGRAD or torch.compiler.is_compiling() or has_fsdp_inside(self.core)
        if outside:
            self._refuse_main_grad(owner)
        if mode == modes.AUTOGRAD:
            # What has second derivatives.
            return by_autograd(job._replace(body=body._replace(impl="reference")), h, again=False)
        if outside:
            return by_autograd(job, h, again=not keep)
        return run(job, h)

    def _refuse_main_grad(self, owner: nn.Module) -> None:
        """Where torch's own graph would leave the gradients in p.grad."""
        if self.main_grad and torch.is_grad_enabled() and any(p.requires_grad for p in owner.parameters()):
            raise NotImplementedError(
                f"{OP}: main_grad needs an eager call, a core that is no unit of FSDP, and another mode than "
                '"autograd" and than going loop by loop'
            )

    def _first_with_gradient(self, count: int) -> int:
        """As a sampler's with_gradient says."""
        last = self.loops.with_gradient if isinstance(self.loops, Sampler) and self.training else None
        return 0 if last is None else max(0, count - last)

    def _count(self, loops: int | None, step: int | None) -> int:
        if loops is None:
            if not isinstance(self.loops, Sampler):
                loops = self.loops
            elif step is not None:
                loops = self.loops.draw(step, self.seed)
            elif self.training:
                raise ValueError(f"{OP}: step must be given in training, as loops are drawn from it, got None")
            else:
                loops = self.loops.in_evaluation
        check_loops(loops)
        if self.max_loops is not None and loops > self.max_loops:
            raise ValueError(f"{OP}: loops must be at most max_loops={self.max_loops}, got {loops}")
        return loops

    def _owner(self) -> nn.Module:
        """Of the parameters that run inside a loop: the core, and the norm if it is a module of the user's."""
        if self.norm is None or isinstance(self.norm, parts.LoopNorm):
            return nn.ModuleList([self.core])
        return nn.ModuleList([self.core, self.norm])

    def _check_implicit(self, all_states: bool, loops: Any, time_steps: Any, per_layer: Any) -> None:
        """A fixed point is that of one map."""
        for name, value, plain in (
            ("conditioning", self.conditioning.kind, "none"),
            ("layer_scalars", self.layer_scalars.kind, "none"),
            ("loop_argument", self.loop_argument, None),
            ("loops", loops, None),
            ("time_steps", time_steps, None),
            ("per_layer", per_layer, None),
        ):
            require(name, value, value == plain, f"be {plain!r} for Implicit, as all loops are one map")
        if self.residual.kind == "euler":
            require("substeps", self.substeps, self.substeps is not None, "be given for Implicit")
        if all_states:
            raise ValueError(f"{OP}: mode must have loops for all_states, got Implicit")

    def _first_state(self, x: Tensor, state: Tensor | None) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{OP}: x must be a tensor of a floating dtype, got {got}")
        if x.dim() < 1 or (self.dim is not None and x.shape[-1] != self.dim):
            rule = f"(..., D={self.dim})" if self.dim is not None else "(..., D)"
            raise ValueError(f"{OP}: x must have shape {rule}, got {tuple(x.shape)}")
        if state is None:
            return self.start_state(x)
        checks.check_state(state, x)
        return state.to(x.dtype)

    def _plan(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], count: int,
        time_steps: Sequence[float] | None, per_layer: dict[str, Any] | None,
    ) -> Plan:  # fmt: skip
        timed = self.conditioning.kind == "time" or self.residual.kind == "euler"
        steps = None if time_steps is None else check_time_steps(time_steps, count, timed)
        shared = {"args": args, "kwargs": kwargs, **self.injection.terms(x), **self.residual.terms()}
        if isinstance(self.norm, parts.LoopNorm):
            shared["norm_weight"] = self.norm.weight
        if self.layer_scalars.kind == "stream":
            shared["x0"] = x
        loops: list[LoopPart] = [{} for _ in range(count)]
        rows = self.conditioning.rows(count, steps, x)
        scalars = self.layer_scalars.rows(count)
        for t, part in enumerate(loops):
            if rows is not None:
                part["embedding"] = rows[t]
            if scalars is not None:
                part["scalars"] = scalars[t]
            if self.residual.kind == "euler":
                dt = steps[t] if steps is not None else 1 / (self.substeps or count)
                part["alpha"], part["beta"] = dt, 1 - dt
        checks.check_per_layer(per_layer)
        for name, values in (per_layer or {}).items():
            self._spread(name, values, loops)
        return Plan(shared, loops)

    def _spread(self, name: str, values: Any, loops: list[LoopPart]) -> None:
        """values[t][i] to loop t and layer i."""
        num_layers = len(self.core) if isinstance(self.core, nn.ModuleList) and self.layered else 1
        if len(values) < len(loops):
            raise ValueError(f"{OP}: per_layer[{name!r}] must have {len(loops)} loops, got {len(values)}")
        for t, part in enumerate(loops):
            row = values[t]
            if len(row) != num_layers:
                raise ValueError(f"{OP}: per_layer[{name!r}][{t}] must have {num_layers} layers, got {len(row)}")
            each = part.setdefault("each", [{} for _ in range(num_layers)])
            for i in range(num_layers):
                each[i][name] = row[i]

    def _body(self, plan: Plan) -> Body:
        fused = isinstance(self.norm, parts.LoopNorm)
        layers = list(self.core) if isinstance(self.core, nn.ModuleList) and self.layered else []
        return Body.of(
            plan, core=None if self.layered else self.core, layers=layers, norm_module=None if fused else self.norm,
            norm=fused, eps=self.norm_eps, scalar_use=self.layer_scalars.kind, loop_argument=self.loop_argument,
            check_finite=self.check_finite,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"loops={self.loops}, mode={self.mode!r}"
