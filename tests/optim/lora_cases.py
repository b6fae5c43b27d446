"""Small LoRA problems, stepped by an optimizer and by the reference with the same gradients."""

import torch
from torch import Tensor, nn

from effkern.ops.lora_rite.reference import Pair, RiteOptions, new_pair, rite_step
from effkern.optim import LoraPair


def normal(seed: int, *shape: int, dtype=torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


class Product(nn.Module):
    """Z = B A of PEFT's layout, A [r, n], B [m, r], pulled towards a matrix of full rank with noise in each step."""

    def __init__(self, m: int, n: int, r: int, *, seed: int, zero_B: bool = True, dtype=torch.float64) -> None:
        super().__init__()
        self.A = nn.Parameter(normal(seed, r, n, dtype=dtype, scale=n**-0.5))
        B = normal(seed + 1, m, r, dtype=dtype, scale=0.3)
        self.B = nn.Parameter(torch.zeros_like(B) if zero_B else B)
        self.target = normal(seed + 2, m, n)
        self.seed = seed

    def gradients(self, A: Tensor, B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Of A [r, n] and B [m, r], in their dtype, from a gradient of Z that changes from step to step."""
        Z = B.double() @ A.double()
        G = (Z - self.target) / Z.numel() + normal(1000 * self.seed + step, *Z.shape, scale=0.3 / Z.numel())
        G = G.to(A.dtype)
        return B.T @ G, G @ A.T


def reference_steps(
    problems: list[Product], steps: int, lrs: list[tuple[float, float]], options: list[RiteOptions]
) -> list[Pair]:
    """The oracle: Z = A' B'^T of the paper has A' = B [m, r] and B' = A^T [n, r] here; sides are symmetric."""
    pairs = [new_pair(p.A.detach().double().T.contiguous(), p.B.detach().double().clone()) for p in problems]
    for step in range(steps):
        grads = []
        for problem, pair in zip(problems, pairs):
            grad_A, grad_B = problem.gradients(pair.A.T, pair.B, step)
            grads.append((grad_A.T, grad_B))
        pairs = rite_step(pairs, grads, lrs, options)
    return pairs


def optimizer_steps(problems: list[Product], optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for p in problems:
            p.A.grad, p.B.grad = p.gradients(p.A.detach(), p.B.detach(), step)
        optimizer.step()


def pairs_of(problems: list[Product]) -> list[LoraPair]:
    return [LoraPair(f"pair{i}", p.A, p.B, 0, 1) for i, p in enumerate(problems)]
