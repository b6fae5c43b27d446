"""The optimizers of docs/migration: the packages' rules, written out in float64, and ours with the options mapped."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effkern.optim import LoRARite, Shampoo
from effkern.optim.lora import import_port_state
from tests.numerics import rel_err
from tests.optim.lora_cases import Product, pairs_of

STEPS = 12


def inverse_power(matrix: Tensor, exponent: float, epsilon: float, rank_rtol: float | None) -> Tensor:
    """Damped by epsilon, or, with rank_rtol, on the range alone."""
    values, vectors = torch.linalg.eigh(matrix)
    if rank_rtol is None:
        powers = (values - values.min().clamp_max(0) + epsilon) ** -exponent
    else:
        powers = torch.where(values > rank_rtol * values.max(), values.abs() ** -exponent, 0.0)
    return vectors @ torch.diag(powers) @ vectors.T


class MetaShampoo:
    """DistributedShampoo's step of one matrix, block by block; options have its names and defaults.

    `exponents` stands for inverse_exponent_override[2], `graft` for grafting_config: a kind with beta2 and epsilon;
    `rank_rtol` for PseudoInverseConfig.
    """

    def __init__(
        self, w: Tensor, lr=1e-2, betas=(0.9, 1.0), epsilon=1e-12, weight_decay=0.0, weight_decay_type="DECOUPLED",
        max_preconditioner_dim=1024, precondition_frequency=1, start_preconditioning_step=-1, exponents=(0.25, 0.25),
        graft: tuple[str, float, float] | None = None, drop_weighting_factor_on_gsquare=False,
        rank_rtol: float | None = None,
    ) -> None:  # fmt: skip
        self.o = SimpleNamespace(**{key: value for key, value in locals().items() if key not in ("self", "w")})
        self.w, self.t, self.peak, limit = w.clone(), 0, lr, max_preconditioner_dim
        if start_preconditioning_step == -1:
            self.o.start_preconditioning_step = precondition_frequency
        rows, cols = ([slice(i, i + limit) for i in range(0, n, limit)] for n in w.shape)
        self.blocks = [(r, c) for r in rows for c in cols]
        self.state = []
        for block in self.blocks:
            like = self.w[block]
            eyes = [torch.eye(n, dtype=w.dtype) for n in like.shape]
            self.state.append(SimpleNamespace(L=0 * eyes[0], R=0 * eyes[1], roots=eyes, m=0 * like, v=0 * like))

    def step(self, grad: Tensor) -> None:
        self.t += 1
        if self.o.weight_decay_type == "L2":
            grad = grad + self.o.weight_decay * self.w
        decay = {"DECOUPLED": 1.0, "L2": 0.0, "CORRECTED": self.o.lr / self.peak, "INDEPENDENT": 1 / self.peak}
        share = self.o.weight_decay * decay[self.o.weight_decay_type]
        for block, s in zip(self.blocks, self.state):
            self.w[block] -= self.o.lr * (self.direction(grad[block], s) + share * self.w[block])

    def direction(self, g: Tensor, s: SimpleNamespace) -> Tensor:
        o, t = self.o, self.t
        beta1, beta2 = o.betas
        whole = beta2 == 1.0 or o.drop_weighting_factor_on_gsquare
        s.L = beta2 * s.L + (1.0 if whole else 1 - beta2) * g @ g.T
        s.R = beta2 * s.R + (1.0 if whole else 1 - beta2) * g.T @ g
        start, every = o.start_preconditioning_step, o.precondition_frequency
        if t == start or (t > start and t % every == 0):
            correction = 1.0 if whole else 1 - beta2**t
            for i, factor in enumerate((s.L, s.R)):
                if o.exponents[i]:
                    s.roots[i] = inverse_power(factor / correction, o.exponents[i], o.epsilon, o.rank_rtol)
        s.m = beta1 * s.m + (1 - beta1) * g
        filtered = s.m / (1 - beta1**t)
        grafted = self.graft(filtered, g, s)
        if grafted is not None and t < start:
            return grafted
        p = s.roots[0] @ filtered @ s.roots[1]
        return p if grafted is None else p * grafted.norm() / (p.norm() + 1e-16)

    def graft(self, filtered: Tensor, g: Tensor, s: SimpleNamespace) -> Tensor | None:
        if self.o.graft is None:
            return None
        kind, beta, epsilon = self.o.graft
        if kind == "SGD":
            return filtered
        s.v = beta * s.v + (1.0 if beta == 1.0 else 1 - beta) * g.square()
        correction = 1 - beta**self.t if kind == "Adam" else 1.0
        return filtered / ((s.v / correction).sqrt() + epsilon)


def as_ours(o: dict[str, Any]) -> dict[str, Any]:
    """The page's table. ridge: factors here are of full rank or cut, so that nothing need be added."""
    beta1, beta2 = o.get("betas", (0.9, 1.0))
    left, right = o.get("exponents", (0.25, 0.25))
    kind, beta, epsilon = o.get("graft") or ("none", 0.95, 1e-8)
    every = o.get("precondition_frequency", 1)
    start = o.get("start_preconditioning_step", -1)
    ema = "weighted" if o.get("drop_weighting_factor_on_gsquare") else "ema"
    return {
        "lr": o.get("lr", 1e-2),
        "betas": (beta1, 0.0 if beta2 == 1.0 else beta2),
        "accumulation": "sum" if beta2 == 1.0 else ema,
        "side": "both" if left and right else "left" if left else "right",
        "exponents": (left, right) if left and right else left or right,
        "ridge": 0.0,
        "pseudo_inverse": o.get("rank_rtol"),
        "grafting": kind.lower(),
        "adamw_betas": (0.9, beta if kind in ("Adam", "RMSprop") else 0.95),
        "eps": epsilon,
        "weight_decay": o.get("weight_decay", 0.0),
        "block_size": o.get("max_preconditioner_dim", 1024),
        "precondition_frequency": every,
        "start_step": every if start == -1 else start,
    }


SHAMPOO_CASES = {
    "defaults": ((6, 6), {}),
    "ema": ((6, 6), {"betas": (0.9, 0.99), "weight_decay": 0.1}),
    "no momentum": ((6, 6), {"betas": (0.0, 0.9)}),
    "adam": ((6, 6), {"betas": (0.9, 0.99), "graft": ("Adam", 0.999, 1e-8), "weight_decay": 0.1}),
    "adam, late and rare": (
        (6, 6),
        {"betas": (0.9, 0.95), "graft": ("Adam", 0.95, 1e-8), "precondition_frequency": 3,
         "start_preconditioning_step": 5},
    ),
    "frequency without a start": ((6, 6), {"betas": (0.9, 0.95), "precondition_frequency": 4}),
    "adagrad": ((6, 6), {"graft": ("AdaGrad", 1.0, 1e-10)}),
    "rmsprop": ((6, 6), {"betas": (0.9, 0.9), "graft": ("RMSprop", 0.99, 1e-8)}),
    "sgd, blocks": ((12, 12), {"betas": (0.9, 0.9), "graft": ("SGD", 0.0, 0.0), "max_preconditioner_dim": 6}),
    "one side": ((5, 9), {"betas": (0.9, 0.9), "exponents": (0.5, 0.0), "graft": ("Adam", 0.99, 1e-8)}),
    "the other": ((9, 5), {"betas": (0.9, 0.9), "exponents": (0.0, 0.5)}),
    "1/2 each": ((6, 6), {"betas": (0.9, 0.9), "exponents": (0.5, 0.5), "graft": ("Adam", 0.99, 1e-8)}),
    "weighted": ((6, 6), {"betas": (0.9, 0.9), "drop_weighting_factor_on_gsquare": True}),
    "pseudo-inverse": ((6, 6), {"betas": (0.9, 0.9), "epsilon": 0.0, "rank_rtol": 1e-9}),
}  # fmt: skip


def quiet(parameters: list[nn.Parameter], **options: Any) -> Shampoo:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Shampoo: exponents sum to")
        return Shampoo(parameters, **options)


@pytest.mark.parametrize("name", SHAMPOO_CASES)
def test_metas_step(name):
    shape, options = SHAMPOO_CASES[name]
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    theirs, ours = MetaShampoo(weight.detach(), **options), quiet([weight], **as_ours(options))
    start = weight.detach().clone()
    for _ in range(STEPS):
        weight.grad = torch.randn(shape, dtype=torch.float64)
        if "rank_rtol" in options:
            # Of rank 4 at every step, always in the same range.
            weight.grad[:2] = weight.grad[:, :2] = 0.0
        theirs.step(weight.grad)
        ours.step()
        assert rel_err(weight.detach() - start, theirs.w - start) < 1e-7
    assert rel_err(start, theirs.w) > 1e-3


@pytest.mark.parametrize("kind", ["L2", "CORRECTED", "INDEPENDENT"])
def test_metas_other_weight_decays(kind):
    """L2: added to the gradient before the step. The others: weight_decay of the group, set with each learning rate."""
    options = {"betas": (0.9, 0.9), "weight_decay": 0.01, "lr": 0.05}
    weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    theirs = MetaShampoo(weight.detach(), **options, weight_decay_type=kind)
    mapped = as_ours(options)
    peak, decay = mapped["lr"], mapped.pop("weight_decay")
    ours = quiet([weight], **mapped, weight_decay=0.0)
    start = weight.detach().clone()
    for t in range(STEPS):
        grad = torch.randn(6, 6, dtype=torch.float64)
        lr = peak * (1 - t / STEPS)
        theirs.o.lr = ours.param_groups[0]["lr"] = lr
        theirs.step(grad)
        weight.grad = grad.clone()
        if kind == "L2":
            weight.grad.add_(weight.detach(), alpha=decay)
        else:
            ours.param_groups[0]["weight_decay"] = decay * {"CORRECTED": lr / peak, "INDEPENDENT": 1 / peak}[kind]
        ours.step()
    assert rel_err(weight.detach() - start, theirs.w - start) < 1e-9


def test_epsilon_is_absolute_there_and_relative_here():
    """Of one factor both are the same where epsilon is ridge times the largest eigenvalue."""
    weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    grad, ridge = torch.randn(6, 6, dtype=torch.float64), 1e-2
    top = torch.linalg.eigvalsh(grad @ grad.T).max().item()
    theirs = MetaShampoo(weight.detach(), epsilon=ridge * top)
    ours = quiet([weight], **{**as_ours({}), "ridge": ridge})
    start, weight.grad = weight.detach().clone(), grad
    theirs.step(grad)
    ours.step()
    assert rel_err(weight.detach() - start, theirs.w - start) < 1e-12


def test_blocks_are_cut_evenly_here():
    """10 rows at most 6: 5 and 5 instead of 6 and 4."""
    weight = nn.Parameter(torch.randn(10, 4))
    optimizer = Shampoo([weight], side="left", block_size=6)
    weight.grad = torch.randn(10, 4)
    optimizer.step()
    assert optimizer.state[weight]["left"].shape == (2, 5, 5)


class AuthorsRite:
    """The authors' LoRARite (lora_rite.py) for pairs A [r, n], B [m, r]: the left factor is A^T, the right one B.

    State has the names of theirs, under each pair.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], **options: Any) -> None:
        defaults = {"betas": (0.9, 0.999), "eps": 1e-6, "lr": 1e-3, "clip_unmagnified_grad": 1.0,
                    "update_skipping": 1.0, "weight_decay": 0.0, "apply_escape": False}  # fmt: skip
        self.o, self.pairs = SimpleNamespace(**{**defaults, **options}), pairs
        self.state = []
        for A, B in pairs:
            s: dict[str, Any] = {"step": 0, "escape_l": 0.0, "escape_r": 0.0}
            for side, x in (("l", A.T), ("r", B)):
                rank = x.shape[1]
                s |= {f"v_{side}": x.new_zeros(rank, rank), f"m_{side}": 0 * x, f"basis_{side}": 0 * x}
            self.state.append(s)

    @staticmethod
    def decay(beta: float, t: int) -> float:
        return beta * (1 - beta ** (t - 1)) / (1 - beta**t)

    @torch.no_grad()
    def step(self, grads: list[tuple[Tensor, Tensor]]) -> None:
        o, work = self.o, []
        for (A, B), (grad_A, grad_B), s in zip(self.pairs, grads, self.state):
            x, g = {"l": A.T, "r": B}, {"l": grad_A.T, "r": grad_B}
            basis, inverse, transport = {}, {}, {}
            for side in "lr":
                basis[side], triangle = torch.linalg.qr(x[side])
                inverse[side] = torch.linalg.pinv(triangle)
            for side, other in ("lr", "rl"):
                g[side] = g[side] @ inverse[other]
                transport[side] = basis[other].T @ s[f"basis_{other}"]
                if g[side].square().mean().sqrt() > o.update_skipping > 0:
                    g[side] = 0 * g[side]
            s |= {"basis_l": basis["l"], "basis_r": basis["r"], "step": s["step"] + 1}
            work.append((x, g, inverse, transport, s))
        norm = sum(g[side].square().sum() for _, g, *_ in work for side in "lr").sqrt()
        for x, g, inverse, transport, s in work:
            b1, b2 = (self.decay(beta, s["step"]) for beta in o.betas)
            for side, other in ("lr", "rl"):
                u, p = g[side], transport[side]
                if norm > o.clip_unmagnified_grad > 0:
                    u = u * o.clip_unmagnified_grad / norm
                moved, escape = p @ s[f"v_{side}"] @ p.T, 0.0
                if o.apply_escape:
                    lost = torch.linalg.eigvalsh(s[f"v_{side}"]) - torch.linalg.eigvalsh(moved)
                    least = torch.minimum(lost.max().clamp_min(0), (s[f"v_{side}"] - moved).trace().clamp_min(0))
                    escape = b2 * (s[f"escape_{side}"] + least)
                v = b2 * moved + (1 - b2) * u.T @ u / len(u)
                values, vectors = torch.linalg.eigh((v + v.T) / 2)
                root = vectors @ torch.diag(1 / ((values.clamp_min(0) + escape).sqrt() + o.eps)) @ vectors.T
                m = b1 * s[f"m_{side}"] @ p.T + (1 - b1) * u @ root
                s |= {f"v_{side}": v, f"m_{side}": m, f"escape_{side}": escape}
                x[side].sub_(o.lr * (m @ inverse[other].T + o.weight_decay * x[side]))


RITE_CASES = {
    "defaults": ({}, {}),
    "decay, betas, eps": (
        {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-4},
        {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-4},
    ),
    "escape": ({"apply_escape": True}, {"escaped_mass": True}),
    "no clip": ({"clip_unmagnified_grad": 0.0}, {"clip_grad": 0.0}),
    "tight clip": ({"clip_unmagnified_grad": 1e-3}, {"clip_grad": 1e-3}),
    "skips": ({"update_skipping": 0.0105}, {"skip_rms": 0.0105}),
}


def problems() -> list[Product]:
    return [Product(9, 12, 3, seed=1), Product(20, 8, 4, seed=5)]


def step_both(theirs: AuthorsRite, ours: torch.optim.Optimizer, of: list[Product], step: int) -> None:
    for p in of:
        p.A.grad, p.B.grad = p.gradients(p.A.detach(), p.B.detach(), step)
    theirs.step([p.gradients(A, B, step) for p, (A, B) in zip(of, theirs.pairs)])
    ours.step()


def hold(of: list[Product], theirs: AuthorsRite) -> None:
    for p, (A, B) in zip(of, theirs.pairs):
        assert rel_err(p.A.detach(), A) < 1e-8
        assert rel_err(p.B.detach(), B) < 1e-8


@pytest.mark.filterwarnings("ignore:LoRARite. an unmagnified gradient")
@pytest.mark.parametrize("name", RITE_CASES)
def test_the_authors_steps(name):
    """From B = 0 on, as PEFT starts."""
    given, mapped = RITE_CASES[name]
    of = problems()
    theirs = AuthorsRite([(p.A.detach().clone(), p.B.detach().clone()) for p in of], lr=0.02, **given)
    ours = LoRARite(pairs_of(of), lr=0.02, **mapped)
    for step in range(STEPS):
        step_both(theirs, ours, of, step)
        hold(of, theirs)
    assert all(B.norm() > 0 for _, B in theirs.pairs)
    # Gradients here are below the default clip.
    if name not in ("defaults", "no clip"):
        plain = AuthorsRite([(p.A.detach().clone(), p.B.detach().clone()) for p in problems()], lr=0.02)
        for step in range(STEPS):
            plain.step([p.gradients(A, B, step) for p, (A, B) in zip(of, plain.pairs)])
        assert max(rel_err(x, y) for a, b in zip(plain.pairs, theirs.pairs) for x, y in zip(a, b)) > 1e-6


@pytest.mark.parametrize("escape", [False, True])
def test_a_run_of_the_authors_goes_on(escape):
    of = problems()
    theirs = AuthorsRite([(p.A.detach().clone(), p.B.detach().clone()) for p in of], lr=0.02, apply_escape=escape)
    for step in range(5):
        theirs.step([p.gradients(A, B, step) for p, (A, B) in zip(of, theirs.pairs)])
    with torch.no_grad():
        for p, (A, B) in zip(of, theirs.pairs):
            p.A.copy_(A)
            p.B.copy_(B)
    ours = LoRARite(pairs_of(of), lr=0.02, escaped_mass=escape)
    state = {2 * i: s for i, s in enumerate(theirs.state)}
    import_port_state(ours, {"state": state, "param_groups": [{"params": list(range(2 * len(of)))}]})
    for step in range(5, STEPS):
        step_both(theirs, ours, of, step)
        hold(of, theirs)
