"""Other optimizers of LoRA pairs over the same Gram matrices, to compare with by one argument."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from effkern.ops.lora_rite import gram
from effkern.optim.lora.base import AT_LEAST_0, BETA, POSITIVE, SHARE, LoraOptimizer, Rule
from effkern.optim.lora.layout import Layout, layout_of, mesh_of
from effkern.optim.lora.runs import no_kernel


@dataclass
class _Batch:
    """Pairs of one group with gradients and of one rank and dtype; lists run over A_0, B_0, A_1, B_1 ..."""

    layouts: list[Layout]
    factors: list[Tensor]
    grads: list[Tensor]
    """Of a frozen factor: zero."""
    rates: list[float | Tensor]

    @property
    def wide(self) -> list[bool]:
        return [layout.wide for layout in self.layouts]

    def grams(self, tensors: list[Tensor], whiten: Tensor | None = None) -> Tensor:
        rank = self.factors[0].shape[0 if self.wide[0] else 1]
        impl = "auto" if no_kernel(rank, tensors[0]) is None else "plain"
        return gram([x.contiguous() for x in tensors], self.wide, whiten, impl=impl)

    def times(self, x: Tensor, i: int, small: Tensor) -> Tensor:
        """Tall x_i small, in x's own layout."""
        small = small.to(x.dtype)
        return (x.T @ small).T if self.wide[i] else x @ small


def _swapped(x: Tensor) -> Tensor:
    """[F, ...] with the two factors of each pair exchanged."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _power(grams: Tensor, power: float, cut: float) -> Tensor:
    """Symmetric power of Gram matrices; eigenvalues at or below cut^2 of the largest count as zero."""
    values, Q = torch.linalg.eigh(grams)
    kept = values > cut**2 * values[:, -1:]
    root = torch.where(kept, values, 1.0) ** power * kept
    return Q * root[:, None, :] @ Q.mT


class _Peer(LoraOptimizer):
    """Steps over batches; a gradient that is not finite skips the whole step (one host read)."""

    # GradScaler then unscales and skips by itself.
    _step_supports_amp_scaling = False
    large_state: tuple[str, ...] = ("exp_avg",)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for pair in self.pairs(self.param_groups[-1]):
            for factor in (pair.A, pair.B):
                if factor.dtype not in (torch.float32, torch.float64) or factor.dtype != pair.A.dtype:
                    raise TypeError(
                        f"{self._me}: {pair.name} must be float32 or float64, both factors, got {factor.dtype}"
                    )
                if mesh_of(factor) is not None:
                    raise NotImplementedError(f"{self._me}: {pair.name} must not be sharded, got a DTensor")

    def _batches(self, group: dict[str, Any]) -> list[_Batch]:
        keyed: dict[Any, _Batch] = {}
        for pair in self.active(group):
            key = (pair.rank, pair.A.device, pair.A.dtype)
            batch = keyed.setdefault(key, _Batch([], [], [], []))
            for factor, dim, ratio in ((pair.A, pair.rank_dim_A, 1.0), (pair.B, pair.rank_dim_B, group["lr_ratio_B"])):
                layout = layout_of(pair.name, factor, dim)
                on = factor.requires_grad
                grad = layout.matrix(cast(Tensor, factor.grad), factor) if on else None
                matrix = layout.matrix(factor.detach())
                batch.layouts.append(layout)
                batch.factors.append(matrix)
                batch.grads.append(torch.zeros_like(matrix) if grad is None else grad)
                batch.rates.append(group["lr"] * ratio if on else 0.0)
        return list(keyed.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all pairs that have gradients; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_rate(group)
        work = [(group, batch) for group in self.param_groups for batch in self._batches(group)]
        grads = [grad for _, batch in work for grad in batch.grads]
        if not all(bool(norm.isfinite()) for norm in torch._foreach_norm(grads, torch.inf)):
            self.skipped.add_(1)
            return loss
        for group, batch in work:
            self._update(group, batch)
        return loss

    def _check_rate(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError where the weight decay of a step would turn a factor round."""
        rate = float(group["lr"]) * max(1.0, group["lr_ratio_B"])
        if rate * group["weight_decay"] >= 1:
            raise ValueError(
                f"{self._me}: lr times weight_decay must be below 1 for both factors, got {rate:g} and "
                f"{group['weight_decay']:g}"
            )

    def _update(self, group: Mapping[str, Any], batch: _Batch) -> None:
        raise NotImplementedError

    def _moment(self, layout: Layout, name: str) -> Tensor:
        state = self.state[layout.param]
        if name not in state:
            state[name] = torch.zeros_like(layout.param)
        return layout.matrix(state[name])


class LoRAMuon(_Peer):
    """LoRA-Muon: the spectral steepest step of Z = A B^T, split evenly between both factors.

        m_A <- beta m_A + (1 - beta) grad_A,   R_B = (B^T B)^-1/2
        A <- s A - lr / (2 s) msign(m_A R_B) R_B,   s = sqrt(1 - lr weight_decay)

    and the mirror image for B, from the old A and B. msign(X) = X (X^T X)^-1/2 comes from r x r eigenvalues in float64,
    where the paper iterates. Factors of no full rank take pseudo-inverses (rank_tolerance), so that B = 0 is a start.

    State: one moment a factor. float32 and float64 factors, not sharded.
    Source: Cesista et al., LoRA-Muon, arXiv 2606.12921.
    """

    rules: Mapping[str, Rule] = {
        "lr": AT_LEAST_0, "momentum": BETA, "weight_decay": AT_LEAST_0, "rank_tolerance": SHARE, "lr_ratio_B": POSITIVE,
    }  # fmt: skip

    def __init__(
        self, params: Any, lr: float | Tensor = 2e-2, *, momentum: float = 0.95, weight_decay: float = 0.0,
        rank_tolerance: float = 1e-6, lr_ratio_B: float = 1.0, others: Literal["error", "ignore"] = "error",
    ) -> None:  # fmt: skip
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rank_tolerance": rank_tolerance,
                   "lr_ratio_B": lr_ratio_B}  # fmt: skip
        super().__init__(params, options, others)

    def _update(self, group: Mapping[str, Any], batch: _Batch) -> None:
        cut = group["rank_tolerance"]
        moments = [self._moment(layout, "exp_avg") for layout in batch.layouts]
        for moment, grad in zip(moments, batch.grads):
            moment.lerp_(grad, 1 - group["momentum"])
        root = _swapped(_power(batch.grams(batch.factors), -0.5, cut))
        sign = _power(batch.grams(moments, root), -0.5, cut)
        small = root @ sign @ root
        for i, (X, lr) in enumerate(zip(batch.factors, batch.rates)):
            s = (1 - lr * group["weight_decay"]) ** 0.5
            X.mul_(s).sub_(batch.times(moments[i], i, small[i]).mul_(lr / (2 * s)))


class ScaledAdam(_Peer):
    """Adam on Riemannian gradients: grad_A (B^T B + reg I)^-1 and grad_B (A^T A + reg I)^-1 in place of the gradients.

    AdamW otherwise, with its two moments and decoupled weight decay. Without Adam the step would be invariant, with it
    it is not. float32 and float64 factors, not sharded.
    Source: Zhang and Pilanci, Riemannian Preconditioned LoRA, arXiv 2402.02347.
    """

    large_state = ("exp_avg", "exp_avg_sq")
    rules: Mapping[str, Rule] = {
        "lr": AT_LEAST_0, "betas": BETA, "eps": AT_LEAST_0, "reg": POSITIVE, "weight_decay": AT_LEAST_0,
        "lr_ratio_B": POSITIVE,
    }  # fmt: skip

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        reg: float = 1e-6, weight_decay: float = 0.0, lr_ratio_B: float = 1.0,
        others: Literal["error", "ignore"] = "error",
    ) -> None:  # fmt: skip
        options = {"lr": lr, "betas": betas, "eps": eps, "reg": reg, "weight_decay": weight_decay,
                   "lr_ratio_B": lr_ratio_B}  # fmt: skip
        super().__init__(params, options, others)

    def _update(self, group: Mapping[str, Any], batch: _Batch) -> None:
        grams = batch.grams(batch.factors)
        eye = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
        inverse = _swapped(torch.linalg.inv(grams + group["reg"] * eye))
        beta1, beta2 = group["betas"]
        for i, (X, lr, layout) in enumerate(zip(batch.factors, batch.rates, batch.layouts)):
            grad = batch.times(batch.grads[i], i, inverse[i])
            state = self.state[layout.param]
            state["step"] = t = state.get("step", 0) + 1
            mean = self._moment(layout, "exp_avg").lerp_(grad, 1 - beta1)
            square = self._moment(layout, "exp_avg_sq").mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            bottom = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
            X.mul_(1 - lr * group["weight_decay"]).sub_(mean / (1 - beta1**t) / bottom * lr)
