"""Runs of LoRA-RITE on small least-squares problems: the core in any implementation, and the reference in float64."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from effkern.ops.lora_rite import RiteGroup, RiteOptions, lora_rite_rebuild_, lora_rite_step_, new_group
from effkern.ops.lora_rite import reference as paper


def as_tall(x: Tensor, wide: bool) -> Tensor:
    return x.T if wide else x


@dataclass
class Problem:
    """Pairs (A, B), tall float64, that minimise |A B^T - target|^2 scale / 2; gradients may be rounded."""

    pairs: list[tuple[Tensor, Tensor]]
    targets: list[Tensor]
    scale: float = 0.05
    wide: list[bool] = field(default_factory=list)

    def __post_init__(self):
        self.wide = self.wide or [True, False] * len(self.pairs)

    def grads(self, factors: list[Tensor]) -> list[Tensor]:
        """Of tall factors A_0, B_0, A_1 ..., in float64."""
        found = []
        for A, B, target in zip(factors[::2], factors[1::2], self.targets):
            residual = self.scale * (A @ B.T - target)
            found += [residual @ B, residual.T @ A]
        return found

    def factors(self) -> list[Tensor]:
        return [x for pair in self.pairs for x in pair]


def make(shapes=((40, 33), (21, 50)), rank=5, zero_B=False, seed_scale=0.3) -> Problem:
    pairs, targets = [], []
    for i, (m, n) in enumerate(shapes):
        B = torch.zeros(n, rank) if zero_B else seed_scale * torch.randn(n, rank)
        # Numbers that float32 has, so that all implementations start alike.
        pairs.append(((seed_scale * torch.randn(m, rank)).double(), B.double()))
        targets.append((1 + 2 * i) * torch.randn(m, n, dtype=torch.float64))
    return Problem(pairs, targets)


def group_of(problem: Problem, dtype: torch.dtype, options: RiteOptions, impl: str) -> RiteGroup:
    factors = [as_tall(x, w).to(dtype).contiguous().clone() for x, w in zip(problem.factors(), problem.wide)]
    group = new_group(factors, problem.wide)
    lora_rite_rebuild_(group, options, impl=impl)
    return group


def tall_factors(group: RiteGroup) -> list[Tensor]:
    return [as_tall(x, w).double() for x, w in zip(group.factors, group.wide)]


def group_grads(problem: Problem, group: RiteGroup) -> list[Tensor]:
    grads = problem.grads(tall_factors(group))
    return [as_tall(g, w).to(x.dtype).contiguous() for g, w, x in zip(grads, group.wide, group.factors)]


def run(
    problem: Problem, steps: int, dtype: torch.dtype, impl: str, options: RiteOptions | None = None,
    lrs: tuple[float, float] = (1e-2, 2e-2),
) -> RiteGroup:  # fmt: skip
    options = options or RiteOptions()
    group = group_of(problem, dtype, options, impl)
    rates = torch.tensor(lrs * len(problem.pairs), dtype=torch.float64)
    for _ in range(steps):
        lora_rite_step_([group], [group_grads(problem, group)], [rates], [options], impl=impl)
    return group


def rounded(x: Tensor) -> Tensor:
    return x.float().double()


def run_paper(
    problem: Problem, steps: int, options: RiteOptions | None = None, lrs: tuple[float, float] = (1e-2, 2e-2),
    rounding: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Tall factors by the reference in float64; `rounding`: gradients and factors are rounded to float32, no more."""
    keep = rounded if rounding else (lambda x: x)
    pairs = [paper.new_pair(keep(A), keep(B)) for A, B in problem.pairs]
    for _ in range(steps):
        grads = [keep(g) for g in problem.grads([x for p in pairs for x in (p.A, p.B)])]
        pairs = paper.rite_step(
            pairs, list(zip(grads[::2], grads[1::2])), [lrs] * len(pairs), [options or RiteOptions()] * len(pairs)
        )
        pairs = [p._replace(A=keep(p.A), B=keep(p.B)) for p in pairs]
    return [x for p in pairs for x in (p.A, p.B)]


def products(factors: list[Tensor]) -> Tensor:
    """All Z = A B^T side by side, as one vector."""
    return torch.cat([(A @ B.T).flatten() for A, B in zip(factors[::2], factors[1::2])])
