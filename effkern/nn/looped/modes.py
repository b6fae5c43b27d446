"""How a looped block is executed: what is kept for backward, and which loops get a gradient."""

import math
from dataclasses import dataclass

FULL, RECOMPUTE, RECOMPUTE_LAYER, AUTOGRAD = "full", "recompute", "recompute_layer", "autograd"
NAMES = (FULL, RECOMPUTE, RECOMPUTE_LAYER, AUTOGRAD)
SOLVERS = ("anderson", "iterate")
BACKWARDS = ("jacobian_free", "adjoint")


@dataclass(frozen=True)
class Truncated:
    """A gradient through the last `loops` loops only; those before run as under no_grad (biased, as in Huginn)."""

    loops: int
    """At least 1, at most the loops of the call."""
    recompute: bool = True
    """Keep the inputs of those loops only, and run each again in backward."""

    def __post_init__(self) -> None:
        if type(self.loops) is not int or self.loops < 1:
            raise ValueError(f"Truncated: loops must be a whole number of at least 1, got {self.loops!r}")


@dataclass(frozen=True)
class Implicit:
    """The fixed point h = F(h) of one loop, instead of a number of loops.

    The solver runs without gradient, and one loop follows from where it stopped. Backward, with J = dF/dh there and g
    the gradient that comes in: "jacobian_free" goes through that one loop with g; "adjoint" with u = J^T u + g, solved
    by the same solver: the gradient of the fixed point itself.
    How far the solvers came: LoopedBlock.last_solution, and its `adjoint` after backward.
    """

    solver: str = "anderson"
    """"anderson", each row of the first dimension on its own, or "iterate": h <- F(h)."""
    steps: int = 30
    """At most so many evaluations of F before the last."""
    tol: float = 1e-3
    """Stop where ||F(h) - h|| <= tol ||F(h)|| in every row; 0 runs all steps and never waits for the device."""
    memory: int = 6
    """Earlier iterates that Anderson mixes: 2 memory states in float32."""
    ridge: float = 1e-6
    """Of Anderson's least squares, relative to the largest squared residual."""
    backward: str = "jacobian_free"
    """"jacobian_free" or "adjoint"."""
    backward_steps: int | None = None
    """None: as `steps`."""
    backward_tol: float | None = None
    """None: as `tol`."""

    def __post_init__(self) -> None:
        _require("solver", self.solver, self.solver in SOLVERS, f"be one of {SOLVERS}")
        _require("backward", self.backward, self.backward in BACKWARDS, f"be one of {BACKWARDS}")
        for name in ("steps", "memory", "backward_steps"):
            value = getattr(self, name)
            if name == "backward_steps" and value is None:
                continue
            _require(name, value, type(value) is int and value >= 1, "be a whole number of at least 1")
        for name in ("tol", "ridge", "backward_tol"):
            value = getattr(self, name)
            if name == "backward_tol" and value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(name, value, number and value >= 0, "be a number of at least 0")
            _require(name, value, math.isfinite(value), "be finite")


Mode = str | Truncated | Implicit


def check_mode(mode: object, op: str) -> None:
    if not isinstance(mode, (Truncated, Implicit)) and mode not in NAMES:
        raise ValueError(f"{op}: mode must be one of {NAMES}, Truncated(...) or Implicit(...), got {mode!r}")


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"Implicit: {name} must {rule}, got {value!r}")
