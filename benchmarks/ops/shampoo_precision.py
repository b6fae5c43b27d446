"""Error of the update X G against float64, for every method, on factors with eight spectra; and what a warm start does.

    python -m benchmarks.ops.shampoo_precision               n = 256, ridges 1e-6, 1e-5, 1e-4 and 1e-2
    python -m benchmarks.ops.shampoo_precision --warm        roots refined from the step before, float64 throughout

Gradients are drawn with the factor's own covariance, as they are in training. "recorded" is the moving average of a
weight's gradients in a small network that learns the bytes of this repository's README. float32 everywhere but in the
truth; "torch eigh" is torch.linalg.eigh in float32 with the ridge on its eigenvalues, "bf16x3" the coupled iteration
with operands split into two bfloat16 numbers, as Triton's kernels split them, "tf32x3" equals float32.

--warm: X is the exact root of the factor before, A the new factor, M = X A X. Newton's step X (3 I - M) / 2, made
symmetric, is repeated; so is the coupled pair (Y, Z) from (A X, X); both are exact only where X and A commute.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from effkern.ops.shampoo import gram_ema_, inverse_root, iterations

RIDGES = (1e-6, 1e-5, 1e-4, 1e-2)
README = Path(__file__).parents[2] / "README.md"


def rotation(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def with_spectrum(values: Tensor) -> Tensor:
    Q = rotation(values.shape[0])
    return (Q * values) @ Q.T


def geometric(decades: int) -> Callable[[int], Tensor]:
    return lambda n: with_spectrum(torch.logspace(0, -decades, n, dtype=torch.float64))


def spike(n: int) -> Tensor:
    return with_spectrum(torch.cat([torch.ones(1), torch.full((n - 1,), 1e-6)]).double())


def rank_deficient(n: int) -> Tensor:
    G = torch.randn(n, n // 4, dtype=torch.float64)
    return G @ G.T


def moving_average(n: int, beta: float = 0.95) -> Tensor:
    """Of gradients of low rank plus noise."""
    Q, scale = rotation(n), torch.logspace(0, -2.6, n, dtype=torch.float64)
    L = torch.zeros(1, n, n, dtype=torch.float64)
    for _ in range(60):
        gram_ema_(L, (Q @ (scale[:, None] * torch.randn(n, n).double()))[None], decay=beta, weight=1 - beta)
    return L[0]


def recorded(n: int, beta: float = 0.95, steps: int = 60) -> list[Tensor]:
    """Factors of the hidden weight of a network that predicts the next byte from four, step after step."""
    torch.manual_seed(0)
    text = torch.tensor(list(README.read_bytes()))
    net = torch.nn.Sequential(
        torch.nn.Embedding(256, n // 4), torch.nn.Flatten(), torch.nn.Linear(n, n), torch.nn.GELU(),
        torch.nn.Linear(n, n), torch.nn.GELU(), torch.nn.Linear(n, 256),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    L, found = torch.zeros(1, n, n, dtype=torch.float64), []
    for _ in range(steps):
        at = torch.randint(len(text) - 5, (256,))
        window = text[at[:, None] + torch.arange(5)]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(window[:, :4]), window[:, 4]).backward()
        weight = net[4].weight
        assert isinstance(weight, Tensor)
        assert weight.grad is not None
        gram_ema_(L, weight.grad.double()[None], decay=beta, weight=1 - beta)
        optimizer.step()
        found.append(L[0].clone())
    return found


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "geometric 1e2": geometric(2),
    "geometric 1e4": geometric(4),
    "geometric 1e6": geometric(6),
    "geometric 1e8": geometric(8),
    "spike": spike,
    "rank-deficient": rank_deficient,
    "EMA": moving_average,
    "recorded": lambda n: recorded(n)[-1],
}


class SplitProducts(iterations.Products):
    """bf16x3: float32 sums of the products of two-part operands, without that of the small parts."""

    def fused(self, X: Tensor, Y: Tensor, beta: float, alpha: float, C: Tensor | None, mirror: bool) -> Tensor:
        (x, x_low), (y, y_low) = (self._split(t) for t in (X, Y))
        product = beta * (x_low @ y + x @ y_low + x @ y)
        return product if C is None else alpha * C + product

    @staticmethod
    def _split(x: Tensor) -> tuple[Tensor, Tensor]:
        high = x.bfloat16().float()
        return high, (x - high).bfloat16().float()


def torch_eigh(A: Tensor, ridge: float) -> Tensor:
    lam, Q = torch.linalg.eigh(A)
    return (Q * (lam.clamp_min(0.0) + ridge * lam[-1]) ** -0.5) @ Q.T


def iterated(method: str) -> Callable[[Tensor, float], Tensor]:
    return lambda A, ridge: inverse_root(A[None], method=method, ridge=ridge, impl="reference").root[0]


def split(method: str) -> Callable[[Tensor, float], Tensor]:
    def run(A: Tensor, ridge: float) -> Tensor:
        top = torch.linalg.eigvalsh(A.double())[-1:].float()
        return iterations.root(A[None], top, method, 2, ridge, SplitProducts())[0]

    return run


METHODS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "torch eigh": torch_eigh,
    "eigh": lambda A, ridge: inverse_root(A[None], method="eigh", ridge=ridge).root[0],
    "rational": lambda A, ridge: inverse_root(A[None], method="rational", ridge=ridge).root[0],
    "polar_express": iterated("polar_express"),
    "gram_ns": iterated("gram_ns"),
    "coupled_newton": iterated("coupled_newton"),
    "polar_express, bf16x3": split("polar_express"),
    "gram_ns, bf16x3": split("gram_ns"),
}


def truth(A: Tensor, ridge: float) -> Tensor:
    return torch_eigh(A.double(), ridge)


def precision(n: int) -> list[dict]:
    lines = []
    for name, make in SPECTRA.items():
        torch.manual_seed(0)
        A = make(n).float()
        A = A.tril() + A.tril(-1).T
        lam, Q = torch.linalg.eigh(A.double())
        G = (Q * lam.clamp_min(0.0).sqrt()) @ torch.randn(n, 2 * n, dtype=torch.float64)
        for ridge in RIDGES:
            want = truth(A, ridge) @ G
            errors = {
                method: ((run(A, ridge).double() @ G - want).norm() / want.norm()).item()
                for method, run in METHODS.items()
            }
            lines.append({"spectrum": name, "n": n, "ridge": ridge, "errors": errors})
    return lines


def warm(n: int, ridge: float = 1e-6, steps: int = 4) -> list[dict]:
    """Errors after 0, 1, ... steps from the exact root of the factor before."""
    lines = []
    for beta in (0.95, 0.99, 0.999):
        factors = recorded(n, beta)
        before, A = factors[-2:]
        top = torch.linalg.eigvalsh(A)[-1]
        A = A + ridge * top * torch.eye(n, dtype=A.dtype)
        want, X = truth(A, 0.0), truth(before, ridge)
        moved = torch.linalg.eigvalsh(X @ A @ X - torch.eye(n, dtype=A.dtype)).abs().max().item()
        newton, Y, Z = X, A @ X, X
        errors: dict[str, list[float]] = {"newton": [], "coupled": []}
        for _ in range(steps + 1):
            for name, root in (("newton", newton), ("coupled", (Z + Z.T) / 2)):
                errors[name].append(((root - want).norm() / want.norm()).item())
            M = newton @ A @ newton
            newton = newton + (newton - newton @ M + (newton - newton @ M).T) / 4
            E = (3 * torch.eye(n, dtype=A.dtype) - Z @ Y) / 2
            Y, Z = Y @ E, E @ Z
        lines.append({"beta": beta, "n": n, "ridge": ridge, "moved": moved, "errors": errors})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    a = parser.parse_args()
    lines = warm(a.n) if a.warm else precision(a.n)
    if a.json:
        for line in lines:
            print(json.dumps({"benchmark": "shampoo_precision", "warm": a.warm, **line, **runner.machine()}))
        return
    if a.warm:
        print("| beta2 | largest change of M | step | Newton | coupled |", "|---|---|---|---|---|", sep="\n")
        for line in lines:
            for i, (x, y) in enumerate(zip(line["errors"]["newton"], line["errors"]["coupled"])):
                print(f"| {line['beta']} | {line['moved']:.1e} | {i} | {x:.1e} | {y:.1e} |")
        return
    print(f"| spectrum | ridge | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 2) + "|", sep="\n")
    for line in lines:
        cells = " | ".join(f"{e:.0e}" for e in line["errors"].values())
        print(f"| {line['spectrum']} | {line['ridge']:.0e} | {cells} |")


if __name__ == "__main__":
    main()
