"""One-sided Shampoo beside the other structured preconditioners on linear regression: who uses the curvature's side.

    python -m benchmarks.papers.shampoo_regression [--dim 96] [--steps 100] [--out FILE.json]

f(X) = <H, (X - X*)(X - X*)^T>, X and H dim x dim, X_0 = 0, entries of X* from N(0, 1/dim), float64, exact gradients
2 H (X - X*). Ten eigenvalues of H are 1, the others 1 / (i - 10)^2; H is diagonal, or turned by a random rotation. Each
method runs with every learning rate 2^-10 .. 2^6, for sums and for moving averages (beta 0.95) of its statistics; the
table holds the least f(X_T) / f(X_0), `0` where it is rounding. One-sided Shampoo runs as the paper's algorithm (eps
1e-8 inside of the root) and as effkern.optim.Shampoo (ridge 1e-8 of the largest eigenvalue), the two-sided one as the
latter. Source: the experiment of arXiv 2503.10537, whose code is not public; its sizes are not confirmed.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor, nn

from effkern.optim import Shampoo
from effkern.optim.structured import Structured

BETA, EPS = 0.95, 1e-8
RATES = tuple(2.0**k for k in range(-10, 7))
ROUNDING = 1e-24


class Problem(NamedTuple):
    H: Tensor
    target: Tensor

    def gradient(self, x: Tensor) -> Tensor:
        return 2.0 * self.H @ (x - self.target)

    def value(self, x: Tensor) -> float:
        gap = x - self.target
        return (gap * (self.H @ gap)).sum().item()


def problem(dim: int, rotated: bool, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    values = torch.ones(dim, dtype=torch.float64)
    values[10:] = 1.0 / torch.arange(1, dim - 9, dtype=torch.float64) ** 2
    basis = torch.eye(dim, dtype=torch.float64)
    if rotated:
        basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    return Problem((basis * values) @ basis.T, target)


Maker = Callable[[nn.Parameter, float, str], torch.optim.Optimizer]


def structured(name: str) -> Maker:
    """The general algorithm; one-sided with L as it is printed in Algorithm 2, n (or m) times the projection."""

    def make(x: nn.Parameter, lr: float, kind: str) -> torch.optim.Optimizer:
        scale = {"left": x.shape[1], "right": x.shape[0]}.get(name, 1)
        return Structured(
            [x], lr / scale**0.5, structure=name, accumulation=kind, beta=BETA, eps=EPS / scale  # type: ignore[arg-type]
        )  # fmt: skip

    return make


def ours(side: str) -> Maker:
    def make(x: nn.Parameter, lr: float, kind: str) -> torch.optim.Optimizer:
        return Shampoo(
            [x], lr, (0.0, BETA), side=side, accumulation=kind, bias_correction=False, grafting="none",
            ridge=EPS, root_method="eigh",
        )  # fmt: skip

    return make


METHODS: dict[str, Maker] = {
    "one-sided, left": structured("left"),
    "one-sided, left, effkern.optim.Shampoo": ours("left"),
    "one-sided, wrong side": structured("right"),
    "two-sided 1/4, 1/4, effkern.optim.Shampoo": ours("both"),
    "diagonal": structured("diagonal"),
    "norm": structured("norm"),
    "full matrix": structured("full-history"),
}


def final(make: Maker, p: Problem, kind: str, lr: float, steps: int) -> float:
    """f(X_T) / f(X_0); infinite where it grew a millionfold on the way."""
    x = nn.Parameter(torch.zeros_like(p.target))
    optimizer, start = make(x, lr, kind), p.value(x.detach())
    for step in range(steps):
        x.grad = p.gradient(x.detach())
        optimizer.step()
        if step % 10 == 9 and not p.value(x.detach()) < 1e6 * start:
            return float("inf")
    return p.value(x.detach()) / start


def best(make: Maker, p: Problem, kind: str, steps: int, rates: tuple[float, ...] = RATES) -> tuple[float, float]:
    """The least final value and its learning rate."""
    return min((final(make, p, kind, lr, steps), lr) for lr in rates)


def measure(dim: int, steps: int, seed: int) -> Iterator[dict[str, Any]]:
    for rotated in (False, True):
        p = problem(dim, rotated, seed)
        for kind in ("sum", "ema"):
            for name, make in METHODS.items():
                start = time.perf_counter()
                value, lr = best(make, p, kind, steps)
                yield {
                    "method": name, "H": "rotated" if rotated else "diagonal", "accumulation": kind, "value": value,
                    "lr": lr, "seconds": time.perf_counter() - start,
                }  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    columns = [("diagonal", "sum"), ("diagonal", "ema"), ("rotated", "sum"), ("rotated", "ema")]
    lines = ["| method | " + " | ".join(f"H {h}, {kind}" for h, kind in columns) + " |", "|---" * 5 + "|"]
    for name in METHODS:
        found = {(r["H"], r["accumulation"]): r for r in records if r["method"] == name}
        cells = [
            "0 (to rounding)" if found[c]["value"] < ROUNDING else f"{found[c]['value']:.1e}"
            for c in columns
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write records and machine as JSON")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    # Runs that diverge are part of the sweep.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    records = []
    for record in measure(a.dim, a.steps, a.seed):
        records.append(record)
        print(json.dumps(record), flush=True)
    print(table(records))
    if a.out:
        case = {"dim": a.dim, "steps": a.steps, "seed": a.seed, "beta": BETA, "eps": EPS, "rates": RATES}
        a.out.write_text(json.dumps({**case, **runner.machine(), "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
