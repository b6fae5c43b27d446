"""Inverse square roots of a batch on a GPU: Triton's sequences beside batched coupled Newton by torch, in float32.

    python -m benchmarks.ops.shampoo_gpu                     36 matrices of 1024, on CUDA
    python -m benchmarks.ops.shampoo_gpu --json

FLOPs are counted as the sequences do them: 2 n^3 per product, half of it where one triangle is computed and mirrored.
The ceiling is what one product of the same batch and precision reaches in the same kernel ("product"). "Newton" is the
iteration of common libraries, X <- X T, M <- T^2 M with T = (3 I - M) / 2, as torch.bmm in float32, until the smallest
eigenvalue has arrived; its number of steps is that of our coupled_newton.
"""

import argparse
import json
from collections.abc import Callable

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from benchmarks.case import Work
from effkern.ops.shampoo import inverse_root, iterations

METHODS = (("polar_express", "tf32x3"), ("polar_express", "bf16x3"), ("gram_ns", "tf32x3"), ("gram_ns", "ieee"))


class Counted(iterations.Products):
    """FLOPs of a sequence, in units of n^3 for each matrix."""

    def __init__(self, mirrors: bool) -> None:
        self.mirrors, self.flops = mirrors, 0.0

    def fused(self, X: Tensor, Y: Tensor, beta: float, alpha: float, C: Tensor | None, mirror: bool) -> Tensor:
        self.flops += 1.0 if mirror and self.mirrors else 2.0
        return super().fused(X, Y, beta, alpha, C, mirror)


def factors(batch: int, n: int, device: str) -> Tensor:
    torch.manual_seed(0)
    scale = torch.logspace(0, -2.6, n, device=device)
    L = torch.zeros(batch, n, n, device=device)
    for _ in range(8):
        G = scale[:, None] * torch.randn(batch, n, n, device=device)
        L = 0.9 * L + 0.1 * G @ G.mT
    return L


def count(method: str, precision: str, n: int, ridge: float) -> float:
    """FLOPs per matrix of size n."""
    counted = Counted(precision != "bf16x3")
    # The steps depend on the side by way of its scale: a diagonal matrix of that side would do, and a small one nearly.
    iterations.root(torch.eye(8)[None], torch.ones(1), method, 2, ridge * 8**0.5 / n**0.5, counted)
    return counted.flops * n**3


def newton(A: Tensor, ridge: float) -> Callable[[], object]:
    steps = iterations.newton_steps(2, ridge / A.shape[1] ** 0.5)
    eye = torch.eye(A.shape[1], device=A.device)

    def run() -> Tensor:
        M = 1.5 * (A / A.norm(dim=(1, 2), keepdim=True) + ridge * eye)
        X = eye.expand_as(A)
        for _ in range(steps):
            T = (3.0 * eye - M) / 2
            X, M = torch.bmm(X, T), torch.bmm(torch.bmm(T, T), M)
        return X

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=36)
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--ridge", type=float, default=1e-6)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        raise runner.Skip("--device must be one that is there, got 'cuda', and torch sees none")
    torch.backends.cuda.matmul.allow_tf32 = False
    A = factors(a.batch, a.n, a.device)
    lam, Q = torch.linalg.eigh(A[:2].double())
    want = (Q * ((lam.clamp_min(0.0) + a.ridge * lam[:, -1:]) ** -0.5)[:, None]) @ Q.mT
    impl = "triton" if a.device == "cuda" else "reference"
    runs: dict[str, Callable[[], object]] = {"newton, torch float32": newton(A, a.ridge)}
    flops = {"newton, torch float32": 6.0 * a.n**3 * iterations.newton_steps(2, a.ridge / a.n**0.5)}
    errors: dict[str, float] = {}
    for method, precision in METHODS:
        if precision == "bf16x3" and method == "gram_ns" and a.ridge < 1e-5:
            continue
        name = f"{method}, {precision}"
        out = torch.empty_like(A)

        def run(method=method, precision=precision, out=out) -> object:
            return inverse_root(A, method=method, precision=precision, ridge=a.ridge, out=out, impl=impl)

        run()
        errors[name] = ((out[:2].double() - want).norm() / want.norm()).item()
        if not errors[name] <= 0.05:
            raise SystemExit(f"wrong result of {name}: relative error {errors[name]:.1e}; nothing is timed")
        runs[name], flops[name] = run, count(method, precision, a.n, a.ridge)
    if impl == "triton":
        from effkern.ops.shampoo.triton import product

        for precision in ("tf32x3", "bf16x3", "ieee"):
            runs[f"product, {precision}"] = lambda p=precision: product(A, A, precision=p)  # type: ignore[misc]
            flops[f"product, {precision}"] = 2.0 * a.n**3
    timings = runner.interleave(runs, a.rounds)
    case = {"batch": a.batch, "n": a.n, "ridge": a.ridge, "device": a.device}
    rate = {name: flops[name] * a.batch / t.wall / 1e12 for name, t in timings.items()}
    extra: dict[str, dict] = {
        name: {
            "tflops": rate[name],
            # Matrices in, roots out.
            **Work(2 * A.nbytes, flops[name] * a.batch).rates(t.wall),
            "error": errors.get(name),
            "of_newton": t.wall / timings["newton, torch float32"].wall,
        }
        for name, t in timings.items()
    }
    for name in timings:
        ceiling = rate.get(f"product, {name.split(', ')[1]}")
        extra[name]["of_product"] = None if ceiling is None else rate[name] / ceiling
    if a.json:
        print("\n".join(runner.result_lines("shampoo_gpu", case, timings, extra)))
        return
    print(json.dumps({**runner.machine(), **case}))
    print("| what | ms | TFLOP/s | of product | of Newton's time | error |", "|---|---|---|---|---|---|", sep="\n")
    for name, t in timings.items():
        e = extra[name]
        share = "" if e["of_product"] is None else f"{e['of_product']:.2f}"
        error = "" if e["error"] is None else f"{e['error']:.0e}"
        print(f"| {name} | {t.wall * 1e3:.1f} | {e['tflops']:.1f} | {share} | {e['of_newton']:.2f} | {error} |")


if __name__ == "__main__":
    runner.told(main)
