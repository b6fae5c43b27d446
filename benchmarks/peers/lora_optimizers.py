"""One step of the adapters of many linear layers: AdamW, LoRA-RITE, and what PEFT has for LoRA.

Results are changes of all factors, A [r, rows] and B [rows, r] in turn, after two steps, each with gradients of
its own.
"""

from collections.abc import Callable
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip  # noqa: F401

import torch
from torch import Tensor, nn

from benchmarks import lora_rite_step
from benchmarks.lora_rite_step import pairs, state_bytes
from benchmarks.peers.matrix_optimizers import gradient
from benchmarks.peers.peer import Family, Peer, Trial
from effkern.ops.lora_rite.reference import RiteOptions, new_pair, rite_step
from effkern.optim import LoRAMuon, LoRARite, ScaledAdam

RATE, RATIO, STEPS = 1e-3, 4.0, 2
REGULARIZER = 1e-2


class Problem:
    """A and B of each layer in turn, with gradients that do not change."""

    def __init__(self, case: dict[str, Any], device: str) -> None:
        self.count, self.rows, self.rank = case["pairs"], case["rows"], case["rank"]
        self.flat = lora_rite_step.problem(self.count, self.rows, self.rank)
        for p in self.flat:
            grad = p.grad
            p.data = p.data.to(device)
            p.grad = None if grad is None else grad.to(device)
        self.start = [p.detach().clone() for p in self.flat]
        self.grads = [p.grad.clone() for p in self.flat if p.grad is not None]

    def at(self, step: int) -> list[Tensor]:
        return [gradient(grad, step) for grad in self.grads]


def trial(x: Problem, optimizer: torch.optim.Optimizer, factors: list[nn.Parameter] | None = None) -> Trial:
    flat = x.flat if factors is None else factors

    def result() -> list[Tensor]:
        return [p.detach() - start for p, start in zip(flat, x.start)]

    def turn(step: int) -> None:
        for p, grad in zip(flat, x.at(step)):
            p.grad = grad

    return Trial(optimizer.step, result, lambda: state_bytes(optimizer), turn)


def on_flat(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[Problem], Trial]:
    return lambda x: trial(x, make(x.flat))


def port(flat: list[nn.Parameter]) -> torch.optim.Optimizer:
    from pytorch_optimizer import LoRARite as Port

    return Port(flat, lr=RATE)


def adapted(x: Problem) -> tuple[Any, list[nn.Parameter]]:
    """A PEFT model whose adapters are the problem's, over weights that take no memory."""
    import peft

    base = nn.Module()
    for i in range(x.count):
        linear = nn.Linear(1, 1, bias=False)
        linear.in_features = linear.out_features = x.rows
        weight = torch.zeros(1, device=x.flat[0].device).expand(x.rows, x.rows)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        setattr(base, f"layer{i}", linear)
    names = [f"layer{i}" for i in range(x.count)]
    model = peft.get_peft_model(base, peft.LoraConfig(r=x.rank, lora_alpha=x.rank, target_modules=names))
    factors = []
    for i in range(x.count):
        layer: Any = model.base_model.model.get_submodule(f"layer{i}")
        for half, given in zip((layer.lora_A, layer.lora_B), x.flat[2 * i : 2 * i + 2]):
            factor = half["default"].weight
            factor.data.copy_(given.detach())
            factor.grad = None if given.grad is None else given.grad.clone()
            factors.append(factor)
    return model, factors


def peft_optimizer(name: str, **options: Any) -> Callable[[Problem], Trial]:
    def build(x: Problem) -> Trial:
        from peft import optimizers

        model, factors = adapted(x)
        create = getattr(optimizers, f"create_{name}_optimizer")
        return trial(x, create(model, torch.optim.AdamW, lr=RATE, weight_decay=0.0, **options), factors)

    return build


def riemannian(x: Problem) -> Trial:
    """It overwrites the gradients, which would grow without end: they are put back before every step, and timed."""
    made = peft_optimizer("riemannian", reg=REGULARIZER)(x)
    assert made.turn is not None
    factors = [p for group in made.step.__self__.param_groups for p in group["params"]]  # type: ignore[attr-defined]
    given = [p.grad.clone() for p in factors]

    def step() -> None:
        for p, grad in zip(factors, given):
            p.grad.copy_(grad)
        made.step()

    def turn(number: int) -> None:
        made.turn(number)  # type: ignore[misc]
        for grad, p in zip(given, factors):
            grad.copy_(p.grad)

    return made._replace(step=step, turn=turn)


def lora_fa(x: Problem) -> Trial:
    from peft import optimizers

    model, factors = adapted(x)
    optimizer = optimizers.create_lorafa_optimizer(model, r=x.rank, lora_alpha=x.rank, lr=RATE)
    made = trial(x, optimizer, factors)
    return made._replace(result=lambda: made.result()[1::2])


# References, in float64 ---------------------------------------------------------------------------------------------


def rite_in_float64(x: Problem) -> list[Tensor]:
    found = []
    for i in range(x.count):
        A, B = (p.detach().double() for p in x.flat[2 * i : 2 * i + 2])
        pair = new_pair(A.T, B)
        for step in range(STEPS):
            grad_A, grad_B = (g.double() for g in x.at(step)[2 * i : 2 * i + 2])
            (pair,) = rite_step([pair], [(grad_A.T, grad_B)], [(RATE, RATE)], [RiteOptions()])
        found += [pair.A.T - A, pair.B - B]
    return found


def adamw_in_float64(
    ratio: float = 1.0, gradients: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
) -> Callable[[Problem], list[Tensor]]:
    """AdamW on what `gradients` makes of A, B and their gradients; B's rate is `ratio` times A's."""

    def run(x: Problem) -> list[Tensor]:
        wide = [nn.Parameter(p.detach().double()) for p in x.flat]
        groups = [{"params": wide[::2], "lr": RATE}, {"params": wide[1::2], "lr": ratio * RATE}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        for step in range(STEPS):
            given = [g.double() for g in x.at(step)]
            for i in range(0, len(wide), 2):
                made = given[i], given[i + 1]
                if gradients is not None:
                    made = gradients(wide[i].detach(), wide[i + 1].detach(), *made)
                wide[i].grad, wide[i + 1].grad = made
            optimizer.step()
        return [p.detach() - start.double() for p, start in zip(wide, x.start)]

    return run


def lora_fa_in_float64(x: Problem) -> list[Tensor]:
    """Of B alone: Adam on g_B (A A^T)^-1, with eps added before the bias is corrected."""
    found = []
    for i in range(0, len(x.flat), 2):
        A, B = (p.detach().double() for p in x.flat[i : i + 2])
        m, v, moved = torch.zeros_like(B), torch.zeros_like(B), torch.zeros_like(B)
        for step in range(STEPS):
            g = torch.linalg.solve(A @ A.T, x.at(step)[i + 1].double().T).T
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            corrected = (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
            moved = moved - RATE * corrected * m / (v.sqrt() + 1e-6)
        found.append(moved)
    return found


def scaled(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor) -> tuple[Tensor, Tensor]:
    """(B^T B + c I)^-1 g_A and g_B (A A^T + c I)^-1."""
    ridge = REGULARIZER * torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    return torch.linalg.solve(B.T @ B + ridge, grad_A), torch.linalg.solve(A @ A.T + ridge, grad_B.T).T


def cases(quick: bool) -> list[dict[str, Any]]:
    small = {"pairs": 64, "rows": 1024, "rank": 16}
    return [small] if quick else [small, {"pairs": 16, "rows": 1024, "rank": 64}]


PEFT: dict[str, Any] = {"package": "peft", "module": "peft.optimizers"}
FAMILY = Family(
    "lora_optimizers",
    "one step of all LoRA pairs, float32",
    cases,
    Problem,
    {"pairs": 2, "rows": 48, "rank": 4},
    {
        "LoRA-RITE": rite_in_float64,
        "AdamW": adamw_in_float64(),
        "LoRA+": adamw_in_float64(RATIO),
        "LoRA-FA": lora_fa_in_float64,
        "Riemannian": adamw_in_float64(gradients=scaled),
    },
    (
        Peer("effkern LoRA-RITE", on_flat(lambda f: LoRARite(pairs(f), lr=RATE)), reference="LoRA-RITE", bound=1e-4),
        Peer(
            "effkern LoRA-Muon", on_flat(lambda f: LoRAMuon(pairs(f), lr=RATE)), reference="",
            differs="the spectral step of LoRA-Muon, which nobody else has",
        ),
        Peer(
            "effkern ScaledAdam", on_flat(lambda f: ScaledAdam(pairs(f), lr=RATE)), reference="",
            differs="Adam first and the r x r preconditioner after it, where PEFT's preconditions what Adam gets",
        ),
        Peer(
            "torch AdamW, foreach", on_flat(lambda f: torch.optim.AdamW(f, lr=RATE, weight_decay=0.0, foreach=True)),
            reference="AdamW", bound=1e-4,
        ),
        Peer(
            "torch AdamW, fused", on_flat(lambda f: torch.optim.AdamW(f, lr=RATE, weight_decay=0.0, fused=True)),
            reference="AdamW", bound=1e-4,
        ),
        # The authors' escape term and eps enter the root otherwise.
        Peer(
            "pytorch-optimizer LoRA-RITE", on_flat(port), package="pytorch-optimizer", module="pytorch_optimizer",
            reference="LoRA-RITE", bound=1e-3,
        ),
        Peer("PEFT LoRA+", peft_optimizer("loraplus", loraplus_lr_ratio=RATIO), reference="LoRA+", bound=1e-4, **PEFT),
        Peer("PEFT Riemannian", riemannian, reference="Riemannian", bound=1e-4, **PEFT),
        # The product with (A A^T)^-1 is in bfloat16.
        Peer("PEFT LoRA-FA", lora_fa, reference="LoRA-FA", bound=2e-2, **PEFT),
    ),
    steps=STEPS,
    shared=False,
)  # fmt: skip
