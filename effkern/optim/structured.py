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


def matrix_power(matrix: Tensor, exponent: float, eps: float = 0.0) -> Tensor:
    """(max(A, 0) + eps I)^exponent of a symmetric matrix, on its eigenvalues; 0^exponent is 0."""
    values, vectors = torch.linalg.eigh(matrix)
    # Rounding makes eigenvalues of size -1e-16: clamped first, so that eps bounds what they become.
    return (vectors * _power(values.clamp_min(0.0) + eps, exponent)) @ vectors.mT


def _power(values: Tensor, exponent: float) -> Tensor:
    return torch.where(values > 0, values, 1.0).pow(exponent) * (values > 0)


class Structure(Protocol):
    """A set of matrices onto which M is projected."""

    def project(self, g: Tensor) -> Tensor:
        """The projection of g g^T, in whatever form holds it."""

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        """V^-1 g with V^2 = projection + eps I; the pseudo-inverse where that is singular."""


class Norm:
    """{c I}: AdaGrad-Norm; the projection of g g^T is |g|^2 / N."""

    def project(self, g: Tensor) -> Tensor:
        return g.square().mean()

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        return g * _power(projection + eps, -0.5)


class Diagonal:
    """Diagonal matrices: AdaGrad."""

    def project(self, g: Tensor) -> Tensor:
        return g.square()

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        return g * _power(projection + eps, -0.5)


class OneSided:
    """Matrices P x I (left) or I x P (right) for an m x n gradient G: G G^T / n, or G^T G / m."""

    def __init__(self, side: Literal["left", "right"]) -> None:
        self.left = side == "left"

    def project(self, g: Tensor) -> Tensor:
        return g @ g.mT / g.shape[1] if self.left else g.mT @ g / g.shape[0]

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        root = matrix_power(projection, -0.5, eps)
        return root @ g if self.left else g @ root


class Full:
    """All matrices, N x N: full-matrix AdaGrad, directly."""

    def project(self, g: Tensor) -> Tensor:
        return torch.outer(g.flatten(), g.flatten())

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        return (matrix_power(projection, -0.5, eps) @ g.flatten()).view_as(g)


class FullHistory:
    """The same from the T gradients so far, for T < N: M = A A^T with columns a_t = sqrt(w_t) g_t.

    f(A A^T) A = A f(A^T A), and the newest gradient is A's last column over sqrt(w_T): so V^-1 g takes the
    eigendecomposition of a T x T matrix. The "projection" is A^T, one row more at each step.
    """

    def project(self, g: Tensor) -> Tensor:
        return g.reshape(1, -1)

    def solve(self, projection: Tensor, g: Tensor, eps: float) -> Tensor:
        length = projection[-1].norm()
        if length == 0:
            return torch.zeros_like(g)
        row = matrix_power(projection @ projection.mT, -0.5, eps)[-1]
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
        eps: >= 0, inside of the root, and added after eigenvalues were clamped at 0. With 0, directions of
            eigenvalue 0 stay, but rounding may have made such an eigenvalue positive.
        layerwise: each parameter has a preconditioner of its own; False: one for all parameters of a group, as one
            vector ("left" and "right" are layerwise by nature), in which an absent gradient counts as zeros.

    A group may have any of these options of its own.

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
        defaults = {"lr": lr, "structure": structure, "accumulation": accumulation, "beta": beta, "eps": eps}
        super().__init__(params, {**defaults, "layerwise": layerwise})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Like torch's.

        Raises:
            ValueError, TypeError: an option or a parameter breaks a rule; the optimizer is as it was.
        """
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

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
                    p.sub_(group["lr"] * _direction(group, self.state[p], p.grad))
            elif live:
                every = group["params"]
                g = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in every])
                moves = _direction(group, self.state[every[0]], g).split([p.numel() for p in every])
                for p, move in zip(every, moves):
                    if p.grad is not None:
                        p.sub_(group["lr"] * move.view_as(p))
        return loss


def _direction(group: dict[str, Any], state: dict[str, Tensor], g: Tensor) -> Tensor:
    """Accumulate and return V^-1 g."""
    structure = STRUCTURES[group["structure"]]()
    decay = 1.0 if group["accumulation"] == "sum" else group["beta"]
    weight = 1.0 - group["beta"] if group["accumulation"] == "ema" else 1.0
    new, old = structure.project(g), state.get("projection")
    if group["structure"] == "full-history":
        # Rows are square roots of the terms of M.
        new = weight**0.5 * new
        state["projection"] = new if old is None else torch.cat([decay**0.5 * old, new])
    else:
        state["projection"] = weight * new if old is None else decay * old + weight * new
    return structure.solve(state["projection"], g, group["eps"])


def _check(group: dict[str, Any]) -> None:
    structure = group["structure"]
    sided = structure in ("left", "right")
    for name, holds, rule in (
        ("structure", structure in STRUCTURES, f"be one of {sorted(STRUCTURES)}"),
        ("accumulation", group["accumulation"] in ("sum", "ema", "weighted"), "be sum, ema or weighted"),
        ("lr", group["lr"] > 0, "be positive"),
        ("beta", 0 <= group["beta"] < 1, "be in [0, 1)"),
        ("eps", group["eps"] >= 0, "be at least 0"),
        ("layerwise", group["layerwise"] or not sided, f"be True for {structure!r}"),
    ):
        if not holds:
            raise ValueError(f"Structured: {name} must {rule}, got {group[name]!r}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"Structured: parameters must be real and floating, got {p.dtype}")
        if sided and p.dim() != 2:
            raise ValueError(f"Structured: parameters must be matrices for {structure!r}, got {tuple(p.shape)}")
