"""LoRA-RITE as a torch.optim.Optimizer."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from effkern.ops.lora_rite import RiteGroup, RiteOptions, lora_rite_rebuild_, lora_rite_step_
from effkern.ops.lora_rite.reference import RANK_TOLERANCE
from effkern.ops.lora_rite.subset import put_back, subset
from effkern.optim.lora import runs
from effkern.optim.lora.base import AT_LEAST_0, BETA, POSITIVE, SHARE, LoraOptimizer
from effkern.optim.lora.layout import mesh_of
from effkern.optim.lora.runs import Run

_OPTIONS = ("betas", "eps", "relative_eps", "weight_decay", "escaped_mass", "second_moment", "clip_grad", "skip_rms",
            "rank_tolerance")  # fmt: skip


class LoRARite(LoraOptimizer):
    """LoRA-RITE: matrix preconditioning of LoRA factors whose steps depend on the product A B^T alone.

    For factor A of Z = A B^T (both tall, [rows, r]; B is the mirror image), with B = U_B R_B:

        g = grad_A R_B^+                                    unmagnified gradient
        P = U_B(t)^T U_B(t-1)                               change of basis since the last step
        V <- b2(t) P V P^T + (1 - b2(t)) g^T g / rows       second moment, r x r
        M <- b1(t) M P^T + (1 - b1(t)) g (V + rho I)^-1/2   first moment of the preconditioned step
        A <- (1 - lr wd) A - lr M R_B^+T                    b(t) = b (1 - b^(t-1)) / (1 - b^t)

    Args:
        params: a model with LoRA adapters (PEFT's or effkern.nn.lora's), a list of pairs (A, B) or LoraPair, named
            parameters, a flat list A, B, A, B in PEFT's layout, or dicts with such `params` and any option below.
            Linear, embedding and convolution factors; 2-d pairs in either orientation.
        lr: learning rate, a number or a 0-d tensor.
        betas: of the first and second moment.
        eps: added to the root of V's eigenvalues; with relative_eps times the largest root.
        weight_decay: decoupled.
        escaped_mass: keep the mass rho that changes of basis lose, and add it to V.
        second_moment: "average" as above, "sum" as in the paper's theorems: V <- P V P^T + g^T g.
        clip_grad: largest norm of the unmagnified gradients of all pairs together; 0 does not clip.
        skip_rms: a factor whose unmagnified gradient has a larger root mean square gets g = 0 in that step, with a
            warning on the CPU; 0 never skips. A loss that is a sum over many tokens can exceed the default.
        rank_tolerance: singular values of a factor at or below this share of its largest one count as zero.
        lr_ratio_B: learning rate of B over that of A (LoRA+, arXiv 2402.12354).
        maximize: ascend.
        fused: None takes the compiled kernels where there are some, True insists on them, False takes plain torch.
        others: "error" refuses a model with trainable parameters that are in no pair, "ignore" leaves them alone.

    State of a factor: exp_avg (M; the parameter's shape, float32), two r x r and smaller float64 tensors, and `master`,
    a float32 copy, where the parameter is bfloat16 or float16: the step is made on it and rounded once. float64 pairs
    are float64 throughout.

    A gradient with NaN or inf anywhere, or a parameter that was written with them: the step changes nothing, no state,
    no step count; `skipped` counts such steps, on the device. Finite float32 gradients above 1e18 overflow and count as
    not finite. Pairs without gradients are left out. A frozen factor (requires_grad=False, as in LoRA-FA, arXiv
    2308.03303) stays, its partner is trained. A parameter written from outside (load_state_dict, copy_) is noticed by
    its version counter and gets a new basis; after writes through `.data` call `rebuild()`. Loaded state is taken bit
    for bit where the weights are those that it was saved with; for others bases are made anew (sharded factors: where
    they differ by more than some 2 %). Above rank 128 eigenvectors are LAPACK's on a CPU, torch's on a GPU.

    Sharded parameters (FSDP2, DTensor) keep their moments cut by rows; r x r sums are added up over the processes.

    Raises:
        ValueError, TypeError: an option out of range, parameters that are no pairs, a factor in two pairs.
        NotImplementedError: fused=True where no kernel runs; sparse gradients.

    Source: Yen et al., LoRA Done RITE, arXiv 2410.20625, and effkern.ops.lora_rite.reference.
    """

    rules: Mapping[str, Any] = {
        "lr": AT_LEAST_0, "betas": BETA, "eps": AT_LEAST_0, "weight_decay": AT_LEAST_0, "clip_grad": AT_LEAST_0,
        "skip_rms": AT_LEAST_0, "rank_tolerance": SHARE, "lr_ratio_B": POSITIVE,
    }  # fmt: skip
    flags = ("relative_eps", "escaped_mass", "maximize")
    small_state = runs.SMALL
    large_state = ("exp_avg",)
    _kept = (*LoraOptimizer._kept, "_fused", "_warned", "_loaded")
    _other_states = "; import_port_state reads that of pytorch_optimizer's LoRARite"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        relative_eps: bool = False,
        weight_decay: float = 0.0,
        escaped_mass: bool = False,
        second_moment: Literal["average", "sum"] = "average",
        clip_grad: float = 1.0,
        skip_rms: float = 1.0,
        rank_tolerance: float = RANK_TOLERANCE,
        lr_ratio_B: float = 1.0,
        maximize: bool = False,
        fused: bool | None = None,
        others: Literal["error", "ignore"] = "error",
    ) -> None:
        if fused is not None and not isinstance(fused, bool):
            raise TypeError(f"LoRARite: fused must be None, True or False, got {fused!r}")
        self._fused = fused
        options = {
            "lr": lr, "betas": betas, "eps": eps, "relative_eps": relative_eps, "weight_decay": weight_decay,
            "escaped_mass": escaped_mass, "second_moment": second_moment, "clip_grad": clip_grad, "skip_rms": skip_rms,
            "rank_tolerance": rank_tolerance, "lr_ratio_B": lr_ratio_B, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, options, others)

    def _forget(self) -> None:
        self._runs: list[tuple[int, Run]] | None = None
        self._rates: dict[Any, Tensor] = {}
        self._loaded: dict[Tensor, Tensor] = getattr(self, "_loaded", {})
        self._warned = getattr(self, "_warned", False)

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if group["second_moment"] not in ("average", "sum"):
            raise ValueError(f"LoRARite: second_moment must be 'average' or 'sum', got {group['second_moment']!r}")
        for name in ("clip_grad", "skip_rms"):
            if self.param_groups and group[name] != self.param_groups[0][name]:
                raise ValueError(
                    f"LoRARite: {name} must be the same in all groups, for it looks at all pairs together, got "
                    f"{group[name]} and {self.param_groups[0][name]}"
                )
        if self._fused:
            for pair in self.pairs(group):
                self._kernel(pair.rank, pair.A)

    def _kernel(self, rank: int, like: Tensor) -> str:
        """The implementation for factors like this one; raises NotImplementedError where fused=True has none."""
        if self._fused is False:
            return "plain"
        reason = runs.no_kernel(rank, like)
        if reason is not None and self._fused:
            raise NotImplementedError(f"LoRARite: fused=True needs a compiled kernel, but {reason}")
        return "plain" if reason is not None else "auto"

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with every tensor of its own memory: it loads with weights_only and resumes bit for bit.

        `weights` of a parameter are a sum over its bits, by which a load sees whether the state is that of its values.
        """
        if self._runs is not None:
            # What was written since the last step.
            self._prepared()
        packed = super().state_dict()
        order = [index for group in packed["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, param in zip(order, params):
            entry = packed["state"].get(index)
            if not entry or "master" in entry or mesh_of(param) is not None:
                continue
            if self._runs is not None:
                entry["weights"] = runs.bit_sum(param)
            elif param in self._loaded:
                entry["weights"] = self._loaded[param].clone()
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._loaded = {param: entry.pop("weights") for param, entry in self.state.items() if "weights" in entry}

    load_state_dict.__doc__ = LoraOptimizer.load_state_dict.__doc__

    @torch.no_grad()
    def rebuild(self, keep_moments: bool = True) -> None:
        """Take the parameters as they are: new bases of all factors.

        keep_moments: in the basis nearest to the old one, else they start again.
        """
        for number, run in self._prepared():
            runs.refresh(run, range(len(run.layouts)))
            self._rebuild(run, list(range(len(run.layouts))), self._options(number), keep_moments)
            run.seen = run.versions()

    def _options(self, number: int) -> RiteOptions:
        group = self.param_groups[number]
        values = {name: group[name] for name in _OPTIONS}
        values["betas"] = tuple(values["betas"])
        return RiteOptions(**values)

    def _rebuild(self, run: Run, factors: list[int], options: RiteOptions, keep_moments: bool = True) -> None:
        """New bases of the pairs of these factors; the others keep their bits."""
        touched = {i // 2 for i in factors}
        if not touched:
            return
        marks = [x if i // 2 in touched else None for i, x in enumerate(run.group.factors)]
        part = subset(run.group, marks)
        assert part is not None
        impl = self._impl(run)
        before = part.group.transport.clone()
        lora_rite_rebuild_(part.group, options, keep_moments=keep_moments, reduce=run.sums, impl=impl)
        # A factor with NaN has no basis: it keeps its old one, and stops all steps until it is written again.
        sound = part.group.transport.isfinite().all(-1).all(-1)
        part.group.transport.copy_(torch.where(sound[:, None, None], part.group.transport, before))
        places = slice(None) if part.index is None else part.index
        run.broken[places] = ~sound
        put_back(part)

    def _impl(self, run: Run) -> str:
        plain = run.impl == "plain"
        return "plain" if plain else self._kernel(run.group.rank, run.group.factors[0])

    def _prepared(self) -> list[tuple[int, Run]]:
        """Runs over the present parameters: made anew after a load, rebuilt where a parameter was written."""
        touched: set[int] = set()
        if self._runs is not None:
            seen = [(number, run, run.versions()) for number, run in self._runs]
            changes = [(p, a, b) for _, run, now in seen for p, a, b in zip(run.params, now, run.seen) if a != b]
            if any(a[1] != b[1] for _, a, b in changes):
                # Other memory: the views are those of the old one.
                self._runs, touched = None, {id(p) for p, _, _ in changes}
            for number, run, now in seen if changes and self._runs is not None else ():
                written = [i for i, (a, b) in enumerate(zip(now, run.seen)) if a != b]
                runs.refresh(run, written)
                self._rebuild(run, written, self._options(number))
                run.seen = now
        if self._runs is None:
            self._rates = {}
            self._runs = runs.make_runs([self.pairs(group) for group in self.param_groups], self.state)
            for number, run in self._runs:
                stale = runs.stale_masters(run)
                runs.refresh(run, stale)
                fresh = runs.fresh_factors(run, self._impl(run), self._loaded)
                known = [id(param) in touched for param in run.params]
                known = known if run.sums is None else run.sums.anywhere(known)
                written = [i for i, it_is in enumerate(known) if it_is]
                self._rebuild(run, sorted({*stale, *fresh, *written}), self._options(number))
                run.seen = run.versions()
            self._loaded = {}
        return self._runs

    def _grads(self, number: int, run: Run) -> list[Tensor | None]:
        """A gradient for each factor, zeros for a frozen one, None for both of a pair that is left out."""
        if run.direct:
            plain = [x.grad for x in run.params if x.requires_grad and x.grad is not None]
            if len(plain) == len(run.params) and all(grad.layout is torch.strided for grad in plain):
                return [grad.T if turned else grad for turned, grad in zip(run.turned, plain)]
        present = {id(pair.A) for pair in self.active(self.param_groups[number])}
        grads: list[Tensor | None] = []
        for i, layout in enumerate(run.layouts):
            if id(run.pairs[i // 2].A) not in present:
                grads.append(None)
            elif not layout.param.requires_grad:
                grads.append(run.zeros.setdefault(i, torch.zeros_like(run.group.factors[i])))
            else:
                grad = cast(Tensor, layout.param.grad)
                like = None if layout.param.dim() == 2 else runs.local_of(layout.param)
                grads.append(layout.matrix(layout.placed(grad), like))
        return grads

    def _lr(self, number: int, run: Run) -> Tensor:
        """[F] learning rates; a frozen factor has 0."""
        group = self.param_groups[number]
        lr, ratio, device = group["lr"], group["lr_ratio_B"], run.group.whiten.device
        trained = tuple(x.requires_grad for x in run.params)
        key = (id(run), trained, ratio)
        if key not in self._rates:
            values = [(ratio if i % 2 else 1.0) * on for i, on in enumerate(trained)]
            self._rates[key] = torch.tensor(values, dtype=torch.float64, device=device)
        # A number goes to the device as an argument of the product: a copy would wait for the device.
        return self._rates[key] * (lr.to(device, torch.float64).reshape(()) if isinstance(lr, Tensor) else float(lr))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all pairs that have gradients; returns what `closure` returns.

        Raises:
            NotImplementedError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        prepared = self._prepared()
        work = []
        for number, run in prepared:
            grads = self._grads(number, run)
            places = [i for i, grad in enumerate(grads) if grad is not None]
            if not places:
                continue
            if self.param_groups[number]["maximize"]:
                for i, grad in zip(places, torch._foreach_neg([cast(Tensor, grads[i]) for i in places])):
                    grads[i] = grad
            work.append((number, run, grads, places))
        if not work:
            return loss
        inverse, found = self._scaling([(run, grads) for _, run, grads, _ in work])
        watch = _Watch([run for _, run, _, _ in work], inverse)
        norm = lora_rite_step_(
            [run.group for _, run, _, _ in work],
            [grads for _, _, grads, _ in work],
            [self._lr(number, run) for number, run, _, _ in work],
            [self._options(number) for number, _, _, _ in work],
            grad_scale=inverse,
            found_inf=found,
            reduce=watch if watch.needed(self._warned) else None,
            impl=self._common_impl([run for _, run, _, _ in work]),
        )
        self.skipped.add_(~norm.isfinite().to(self.skipped.device))
        if not self._warned and watch.skipped(self.param_groups[0]["skip_rms"]):
            self._warned = True
            warnings.warn(
                "LoRARite: an unmagnified gradient has a root mean square above skip_rms="
                f"{self.param_groups[0]['skip_rms']}, so that its factor takes no gradient in this step. Is the loss "
                "a sum instead of a mean? (said once)",
                stacklevel=2,
            )
        for _, run, _, places in work:
            runs.publish(run, places)
            torch.autograd.graph.increment_version([run.locals[i] for i in places])
            run.seen = run.versions()
        return loss

    def _scaling(self, work: list[tuple[Run, list[Tensor | None]]]) -> tuple[Tensor | None, Tensor]:
        """What gradients are to be multiplied with, and not 0 where the step must change nothing; of a GradScaler, and
        of factors that have no basis."""
        device = work[0][0].group.whiten.device
        found = torch.stack([run.broken.any().to(device) for run, _ in work]).any().double()
        if getattr(self, "found_inf", None) is not None:
            found = found + self.found_inf.to(device).reshape(())  # type: ignore[attr-defined]
        scale = getattr(self, "grad_scale", None)
        if scale is None:
            return None, found
        inverse = 1 / scale.double().to(device).reshape(())
        if all(run.group.whiten.device == device for run, _ in work):
            return inverse, found
        for run, grads in work:
            own = inverse.to(run.group.whiten.device)
            grads[:] = [None if grad is None else grad.to(run.group.factors[0].dtype) * own for grad in grads]
        return None, found

    def _common_impl(self, work: list[Run]) -> str:
        """One implementation for a call: the clip needs all gradients at once."""
        chosen = {self._impl(run) for run in work if run.group.factors[0].dtype == torch.float32 or run.impl == "plain"}
        return "plain" if self._fused is False or "plain" in chosen else "auto"


class _Watch:
    """Sees the sums over rows on their way: adds them up over processes, and remembers large ones on the CPU."""

    def __init__(self, work: list[Run], scale: Tensor | None) -> None:
        self.scale = scale
        self.sums = {id(f): run.sums for run in work for f in run.group.factors if run.sums is not None}
        self.on_cpu = work[0].group.whiten.device.type == "cpu"
        self.grams: list[tuple[RiteGroup, Tensor]] = []
        self._first: set[int] = set()

    def needed(self, warned: bool) -> bool:
        return bool(self.sums) or (self.on_cpu and not warned)

    def __call__(self, group: RiteGroup, x: Tensor) -> Tensor:
        sums = self.sums.get(id(group.factors[0]))
        x = x if sums is None else sums(group, x)
        if self.on_cpu and id(group) not in self._first:
            self._first.add(id(group))
            self.grams.append((group, x))
        return x

    def skipped(self, limit: float) -> bool:
        if limit <= 0:
            return False
        for group, grams in self.grams:
            mean = grams.diagonal(dim1=-2, dim2=-1).sum(-1) / (group.rows * group.rank)
            mean = mean if self.scale is None else mean * self.scale.square()
            if bool((mean.isfinite() & (mean > limit**2)).any()):
                return True
        return False
