"""Structured preconditioners: the one algorithm of the unified analysis, with a projection per structure.

    M_t = decay M_{t-1} + weight g g^T
    V_t^2 = the projection of M_t + eps I onto the structure
    x_{t+1} = x_t - lr V_t^-1 g

The projection is linear, so that what is kept is the projection of M_t alone. Everything is computed in the parameter's
own dtype, by eigendecompositions: an oracle for effkern.optim.Shampoo and the subject of the paper's experiment, not a
fast optimizer. Source: Xie et al., "Structured Preconditioners in Adaptive Optimization" (arXiv 2503.10537).
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Accumulation = Literal["sum", "ema", "weighted"]


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    """(max(A, 0))^exponent of a symmetric matrix, on its eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0.0).pow(exponent)) @ vectors.mT


class Structure(Protocol):
    """A set of matrices onto which M is projected."""

    def project(self, g: Tensor) -> Tensor:
        """The projection of g g^T, in whatever form holds it."""

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        """V^-1 g with V^2 = projection + eps I."""


class Norm:
    """{c I}: AdaGrad-Norm; the projection of g g^T is |g|^2 / N."""

    def project(self, g: Tensor) -> Tensor:
        return g.square().mean()

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        return g / (projection + eps).sqrt()


class Diagonal:
    """Diagonal matrices: AdaGrad."""

    def project(self, g: Tensor) -> Tensor:
        return g.square()

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        return g / (projection + eps).sqrt()


class OneSided:
    """Matrices P x I (left) or I x P (right) for an m x n gradient G: G G^T / n, or G^T G / m."""

    def __init__(self, side: Literal["left", "right"]) -> None:
        self.left = side == "left"

    def project(self, g: Tensor) -> Tensor:
        return g @ g.mT / g.shape[1] if self.left else g.mT @ g / g.shape[0]

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        root = matrix_power(projection + eps * torch.eye(len(projection), dtype=g.dtype, device=g.device), -0.5)
        return root @ g if self.left else g @ root


class Full:
    """All matrices, N x N: full-matrix AdaGrad, directly."""

    def project(self, g: Tensor) -> Tensor:
        return torch.outer(g.flatten(), g.flatten())

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        identity = torch.eye(len(projection), dtype=g.dtype, device=g.device)
        return (matrix_power(projection + eps * identity, -0.5) @ g.flatten()).view_as(g)


class FullHistory:
    """The same from the T gradients so far, for T < N: M = A A^T with columns a_t = sqrt(w_t) g_t.

    f(A A^T) A = A f(A^T A), and the newest gradient is A's last column over sqrt(w_T): so V^-1 g takes the
    eigendecomposition of a T x T matrix. The "projection" is A^T, one row more at each step.
    """

    def project(self, g: Tensor) -> Tensor:
        return g.reshape(1, -1)

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        size = len(projection)
        gram = projection @ projection.mT + eps * torch.eye(size, dtype=g.dtype, device=g.device)
        length = projection[-1].norm()
        if length == 0:
            return torch.zeros_like(g)
        row = matrix_power(gram, -0.5)[-1]
        return (row @ projection).view_as(g) * (g.norm() / length)


STRUCTURES: dict[str, Callable[[], Structure]] = {
    "norm": Norm,
    "diagonal": Diagonal,
    "full": Full,
    "full-history": FullHistory,
    "left": lambda: OneSided("left"),
    "right": lambda: OneSided("right"),
}


class Structured(torch.optim.Optimizer):
    """The algorithm above for one structure.

    Args:
        params: real floating parameters. With "left" and "right" matrices.
        lr: eta > 0.
        structure: "norm", "diagonal", "left", "right", "full" (N x N memory) or "full-history" (T x N memory, T steps).
        accumulation: "sum" decay 1, weight 1; "ema" beta, 1 - beta; "weighted" beta, 1.
        beta: in [0, 1), for "ema" and "weighted".
        eps: >= 0, inside of the root.
        layerwise: each parameter has a preconditioner of its own; False: one for all parameters of a group, as one
            vector ("left" and "right" are layerwise by nature).

    Raises:
        ValueError: an option breaks a rule, or a parameter is no matrix where one is needed.
        TypeError: a parameter is not real and floating.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        structure: str,
        accumulation: Accumulation = "sum",
        beta: float = 0.95,
        eps: float = 1e-8,
        layerwise: bool = True,
    ) -> None:
        for name, holds, rule, value in (
            ("structure", structure in STRUCTURES, f"be one of {sorted(STRUCTURES)}", structure),
            ("accumulation", accumulation in ("sum", "ema", "weighted"), "be sum, ema or weighted", accumulation),
            ("lr", lr > 0, "be positive", lr),
            ("beta", 0 <= beta < 1, "be in [0, 1)", beta),
            ("eps", eps >= 0, "be at least 0", eps),
            ("layerwise", layerwise or structure not in ("left", "right"), f"be True for {structure!r}", layerwise),
        ):
            if not holds:
                raise ValueError(f"Structured: {name} must {rule}, got {value!r}")
        self._structure = STRUCTURES[structure]()
        self._grows = structure == "full-history"
        defaults = {"lr": lr, "structure": structure, "accumulation": accumulation, "beta": beta, "eps": eps}
        super().__init__(params, {**defaults, "layerwise": layerwise})
        for p in (p for group in self.param_groups for p in group["params"]):
            if not p.is_floating_point():
                raise TypeError(f"Structured: parameters must be real and floating, got {p.dtype}")
            if structure in ("left", "right") and p.dim() != 2:
                raise ValueError(f"Structured: parameters must be matrices for {structure!r}, got {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            if group["layerwise"]:
                for p in live:
                    p.sub_(group["lr"] * self._direction(group, self.state[p], p.grad))
            elif live:
                g = torch.cat([p.grad.flatten() for p in live])
                moves = self._direction(group, self.state[group["params"][0]], g).split([p.numel() for p in live])
                for p, move in zip(live, moves):
                    p.sub_(group["lr"] * move.view_as(p))
        return loss

    def _direction(self, group: dict[str, Any], state: dict[str, Tensor], g: Tensor) -> Tensor:
        """Accumulate and return V^-1 g."""
        decay = 1.0 if group["accumulation"] == "sum" else group["beta"]
        weight = 1.0 - group["beta"] if group["accumulation"] == "ema" else 1.0
        new, old = self._structure.project(g), state.get("projection")
        if self._grows:
            # Rows are square roots of the terms of M.
            new = weight**0.5 * new
            state["projection"] = new if old is None else torch.cat([decay**0.5 * old, new])
        else:
            state["projection"] = weight * new if old is None else decay * old + weight * new
        return self._structure.solve(state["projection"], g, group["eps"])
