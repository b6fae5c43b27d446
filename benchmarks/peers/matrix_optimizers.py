"""A whole step of optimizers of matrices: 4 width x width, width x 4 width and 4 width x width per layer, and a table.

Preconditioners are renewed at every step. Results are changes of the matrices after three steps, each with
another gradient.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip  # noqa: F401

import torch
from torch import Tensor, nn

from benchmarks import shampoo_step
from benchmarks.lora_rite_step import state_bytes
from benchmarks.peers.peer import Family, Peer, Trial
from effkern.optim import OneSidedShampoo, Shampoo

RATE, DECAY, FACTOR_DECAY, RIDGE = 1e-3, 0.1, 0.95, 1e-6


class Problem:
    """Matrices and table with gradients that do not change."""

    def __init__(self, case: dict[str, Any], device: str) -> None:
        matrices, table = shampoo_step.parameters(SimpleNamespace(**case))  # type: ignore[arg-type]
        for p in (*matrices, table):
            grad = p.grad
            p.data = p.data.to(device)
            p.grad = None if grad is None else grad.to(device)
        self.matrices, self.table = matrices, table
        self.start = [p.detach().clone() for p in matrices]
        self.grads = [p.grad.clone() for p in matrices if p.grad is not None]


def gradient(given: Tensor, step: int) -> Tensor:
    """That of a step: the given one under a mask, so that no two steps have the same row and column spaces."""
    places = torch.arange(given.numel(), dtype=given.dtype, device=given.device).view_as(given)
    return given * (1 + 0.9 * torch.sin((1.7 + step) * places))


def trial(x: Problem, *optimizers: torch.optim.Optimizer, copied: bool = False) -> Trial:
    """`copied`: the step consumes its gradients, so that copies of them are made within its time."""
    given = [(p, p.grad) for p in (*x.matrices, x.table)]

    def step() -> None:
        for p, grad in given:
            p.grad = grad.clone() if copied and grad is not None else grad
        for optimizer in optimizers:
            optimizer.step()

    def result() -> list[Tensor]:
        return [p.detach() - start for p, start in zip(x.matrices, x.start)]

    def turn(number: int) -> None:
        given[: len(x.matrices)] = [(p, gradient(grad, number)) for p, grad in zip(x.matrices, x.grads)]

    return Trial(step, result, lambda: sum(state_bytes(optimizer) for optimizer in optimizers), turn)


def rest(x: Problem) -> torch.optim.Optimizer:
    """What every peer gives to AdamW."""
    return torch.optim.AdamW([x.table], lr=RATE, fused=True)


def adamw(**options: Any) -> Callable[[Problem], Trial]:
    return lambda x: trial(x, torch.optim.AdamW([*x.matrices, x.table], lr=RATE, weight_decay=DECAY, **options))


def ours(cls: type[Shampoo], **options: Any) -> Callable[[Problem], Trial]:
    def build(x: Problem) -> Trial:
        groups = [{"params": x.matrices, "rule": "shampoo"}, {"params": [x.table], "rule": "adamw"}]
        return trial(x, cls(groups, lr=shampoo_rate(), betas=(0.9, FACTOR_DECAY), ridge=RIDGE, **options))

    return build


def shampoo_rate() -> float:
    """That of shampoo_step.Plain, which writes it into its step."""
    return 1e-4


def plain(x: Problem) -> Trial:
    return trial(x, shampoo_step.Plain(x.matrices), rest(x))


def muon(x: Problem) -> Trial:
    return trial(x, torch.optim.Muon(x.matrices, lr=RATE, weight_decay=DECAY), rest(x))


def pytorch_optimizer(name: str, **options: Any) -> Callable[[Problem], Trial]:
    def build(x: Problem) -> Trial:
        import pytorch_optimizer

        return trial(x, getattr(pytorch_optimizer, name)(x.matrices, lr=RATE, **options), rest(x))

    return build


def heavyball(name: str, **options: Any) -> Callable[[Problem], Trial]:
    def build(x: Problem) -> Trial:
        import heavyball

        # Its default compiles every update for every shape, in minutes on a CPU.
        heavyball.utils.compile_mode = None
        return trial(x, getattr(heavyball, name)(x.matrices, lr=RATE, **options), rest(x), copied=True)

    return build


# References, in float64 ---------------------------------------------------------------------------------------------


def change(x: Problem, step: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]) -> list[Tensor]:
    """What all steps do; `step` returns the new matrix from the old one, its gradient and its state."""
    found = []
    for start, grad in zip(x.start, x.grads):
        w, state = start.double(), dict[str, Tensor]()
        for i in range(STEPS):
            w = step(w, gradient(grad, i).double(), state)
        found.append(w - start.double())
    return found


def adamw_in_float64(x: Problem) -> list[Tensor]:
    wide = [nn.Parameter(p.detach().double()) for p in x.matrices]
    optimizer = torch.optim.AdamW(wide, lr=RATE, weight_decay=DECAY)
    for i in range(STEPS):
        for p, grad in zip(wide, x.grads):
            p.grad = gradient(grad, i).double()
        optimizer.step()
    return [p.detach() - start.double() for p, start in zip(wide, x.start)]


def power(A: Tensor, exponent: float) -> Tensor:
    lam, Q = torch.linalg.eigh(A)
    return (Q * (lam.clamp_min(0.0) + RIDGE * lam[-1]) ** exponent) @ Q.T


def shampoo_in_float64(both: bool) -> Callable[[Problem], list[Tensor]]:
    """W - lr 0.2 sqrt(m n) U / |U|, U = L^-1/2 M on the smaller side, or L^-1/4 M R^-1/4."""

    def step(w: Tensor, g: Tensor, s: dict[str, Tensor]) -> Tensor:
        for name, new, keep in (("m", g, 0.9), ("l", g @ g.T, FACTOR_DECAY), ("r", g.T @ g, FACTOR_DECAY)):
            s[name] = keep * s.get(name, torch.zeros_like(new)) + (1 - keep) * new
        left, u = g.shape[0] <= g.shape[1], s["m"]
        if both or left:
            u = power(s["l"], -0.25 if both else -0.5) @ u
        if both or not left:
            u = u @ power(s["r"], -0.25 if both else -0.5)
        return w - shampoo_rate() * 0.2 * g.numel() ** 0.5 * u / u.norm()

    return lambda x: change(x, step)


def muon_in_float64(x: Problem) -> list[Tensor]:
    """Nesterov momentum, five quintic Newton-Schulz steps, a rate that grows with sqrt(rows / columns)."""

    def step(w: Tensor, g: Tensor, s: dict[str, Tensor]) -> Tensor:
        s["m"] = 0.95 * s.get("m", torch.zeros_like(g)) + 0.05 * g
        u = 0.05 * g + 0.95 * s["m"]
        flip = u.shape[0] > u.shape[1]
        X = (u.T if flip else u) / u.norm()
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
        rate = RATE * max(1.0, g.shape[0] / g.shape[1]) ** 0.5
        return (1 - RATE * DECAY) * w - rate * (X.T if flip else X)

    return change(x, step)


def cases(quick: bool) -> list[dict[str, Any]]:
    return [{"width": 384, "layers": 1 if quick else 6, "vocabulary": 4096, "roots_every": 1}]


STEPS = 3
PYTORCH_OPTIMIZER: dict[str, Any] = {"package": "pytorch-optimizer", "module": "pytorch_optimizer", "reference": ""}
HEAVYBALL: dict[str, Any] = {"package": "heavyball", "reference": ""}
# Roots of float32 factors by Cholesky inverses are good to some 1e-3 (benchmarks.ops.shampoo_precision).
ROOTS = 1e-2
FAMILY = Family(
    "matrix_optimizers",
    "one step of all matrices of a decoder and its embedding, preconditioners renewed every time",
    cases,
    Problem,
    {"width": 32, "layers": 1, "vocabulary": 64},
    {
        "AdamW": adamw_in_float64,
        "one-sided": shampoo_in_float64(both=False),
        "two-sided": shampoo_in_float64(both=True),
        "Muon": muon_in_float64,
    },
    (
        Peer("effkern one-sided Shampoo", ours(OneSidedShampoo), reference="one-sided", bound=ROOTS),
        Peer("effkern two-sided Shampoo", ours(Shampoo, side="both"), reference="two-sided", bound=ROOTS),
        Peer("torch AdamW, foreach", adamw(foreach=True), reference="AdamW", bound=1e-4),
        Peer("torch AdamW, fused", adamw(fused=True), reference="AdamW", bound=1e-4),
        # It iterates in bfloat16.
        Peer("torch Muon", muon, reference="Muon", bound=5e-2),
        Peer("one-sided, torch.linalg.eigh", plain, reference="one-sided", bound=ROOTS),
        Peer(
            "pytorch-optimizer Shampoo", pytorch_optimizer("Shampoo", preconditioning_compute_steps=1),
            differs="sums of Gram matrices, both sides at -1/4 by SVD, no momentum, no grafting", **PYTORCH_OPTIMIZER,
        ),
        Peer(
            "pytorch-optimizer ScalableShampoo",
            pytorch_optimizer("ScalableShampoo", start_preconditioning_step=1, preconditioning_compute_steps=1),
            differs="blocks of 512, coupled Newton in float32, SGD grafting, Nesterov", **PYTORCH_OPTIMIZER,
        ),
        Peer(
            "pytorch-optimizer SOAP", pytorch_optimizer("SOAP", precondition_frequency=1),
            differs="Adam in the eigenbasis of both factors, by QR; its first step starts the state alone",
            **PYTORCH_OPTIMIZER,
        ),
        Peer(
            "HeavyBall SOAP", heavyball("SOAP", precondition_frequency=1, use_precond_schedule=False),
            differs="as SOAP above, with its own gradient handling; not compiled", **HEAVYBALL,
        ),
        Peer(
            "HeavyBall Muon", heavyball("Muon"),
            differs="its own orthogonalization, grafting and momentum; not compiled", **HEAVYBALL,
        ),
        Peer(
            "distributed_shampoo", plain, reference="one-sided", package="distributed-shampoo",
            devices=(), why_not="no package of that name on the index; it installs from its repository alone",
        ),
    ),
    steps=STEPS,
    shared=False,
)  # fmt: skip
