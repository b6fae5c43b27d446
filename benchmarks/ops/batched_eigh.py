"""batched_eigh beside torch.linalg.eigh, and its errors on hard matrices.

    python -m benchmarks.ops.batched_eigh                      time per matrix, n = 4 ... 128, both dtypes
    python -m benchmarks.ops.batched_eigh --adversarial        errors of all solvers on hard matrices

Errors are in units of n eps: backward |A - Q diag(w) Q^T| / |A|, orthogonality |Q^T Q - I|, Frobenius norms, the worst
matrix of a batch; `relative` is the largest relative error of an eigenvalue against float64, for float32 matrices.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from effkern import batched_eigh

SOLVERS: dict[str, dict[str, str]] = {
    "auto": {"method": "auto"},
    "jacobi": {"method": "jacobi"},
    "lapack": {"method": "lapack"},
    "torch": {"impl": "reference"},
}


def spectrum(values: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    q = torch.linalg.qr(torch.randn(count, len(values), len(values), dtype=torch.float64))[0]
    a = (q * values.double()) @ q.mT
    return ((a + a.mT) / 2).to(dtype)


def adversarial(n: int, dtype: torch.dtype, count: int) -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(0)
    eps = torch.finfo(dtype).eps
    random = torch.randn(count, n, n, dtype=dtype)
    random = (random + random.mT) / 2
    near = 1 + torch.arange(n, dtype=torch.float64) * eps
    low = torch.randn(count, n, n // 3, dtype=dtype)
    scales = 2.0 ** -torch.linspace(0, 12, n).round().to(dtype)
    yield "random", random
    yield "two clusters, gaps of eps", spectrum(torch.where(torch.arange(n) % 2 == 0, near, -3 * near), count, dtype)
    yield "rank n/3", low @ low.mT
    yield "graded 1 ... 1e-12", spectrum(torch.logspace(0, -12, n, dtype=torch.float64), count, dtype)
    yield "D H D, condition 1e7", scales[:, None] * (torch.eye(n, dtype=dtype) + random / (8 * n**0.5)) * scales
    yield "zero", torch.zeros(count, n, n, dtype=dtype)
    yield "diagonal", torch.diag_embed(torch.randn(count, n, dtype=dtype))
    yield "all ones", torch.ones(count, n, n, dtype=dtype)
    yield "times 1e30", random * 1e30
    yield "times 1e-30", random * 1e-30
    broken = random.clone()
    broken[::2, 1, 0] = float("nan")
    broken[1::2, 2, 1] = float("inf")
    yield "NaN and infinity", broken


def errors(a: Tensor, solver: dict[str, str]) -> dict[str, Any]:
    n, eps = a.shape[-1], torch.finfo(a.dtype).eps
    values, vectors, status = batched_eigh(a, **solver)
    found: dict[str, Any] = {"status": sorted(set(status.tolist()))}
    if status.any():
        found["all_nan"] = bool(values.isnan().all() and vectors.isnan().all())
        return found
    size = a.double().abs().amax((-2, -1)).clamp_min(1e-300)
    wide, w, q = a.double() / size[:, None, None], values.double() / size[:, None], vectors.double()
    norms = wide.norm(dim=(-2, -1)).clamp_min(1e-300)
    found["backward"] = (((q * w[:, None]) @ q.mT - wide).norm(dim=(-2, -1)) / norms).max().item() / n / eps
    found["orthogonality"] = (q.mT @ q - torch.eye(n, dtype=q.dtype)).norm(dim=(-2, -1)).max().item() / n / eps
    if a.dtype == torch.float32:
        truth = torch.linalg.eigvalsh(a.double())
        found["relative"] = ((values - truth).abs() / truth.abs().clamp_min(1e-300)).max().item()
    return found


def print_adversarial(orders: list[int], count: int, as_json: bool) -> None:
    if not as_json:
        print(
            "| n | dtype | matrices | solver | backward | orthogonality | relative | status |",
            "|" + "---|" * 8,
            sep="\n",
        )
    for n, dtype in product(orders, (torch.float32, torch.float64)):
        for (name, matrices), solver in product(adversarial(n, dtype, count), ("jacobi", "lapack")):
            found = errors(matrices, SOLVERS[solver])
            case = {"n": n, "dtype": str(dtype).removeprefix("torch."), "matrices": name, "solver": solver}
            if as_json:
                print(json.dumps({"benchmark": "batched_eigh_errors", **case, **found, **runner.machine()}), flush=True)
                continue
            cells = [f"{found[k]:.1e}" if k in found else "" for k in ("backward", "orthogonality", "relative")]
            note = f"{found['status']}" + (", all NaN" if found.get("all_nan") else "")
            print(f"| {' | '.join(map(str, case.values()))} | {' | '.join(cells)} | {note} |", flush=True)


def variants(a: Tensor) -> dict[str, Callable[[], object]]:
    def run(options: dict[str, str]) -> Callable[[], object]:
        return lambda: batched_eigh(a, **options)

    return {name: run(options) for name, options in SOLVERS.items() if a.device.type == "cpu" or name != "lapack"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adversarial", action="store_true")
    parser.add_argument("--orders", type=int, nargs="+", default=[4, 8, 16, 24, 32, 48, 64, 128])
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if not a.json:
        print(json.dumps(runner.machine()))
    if a.adversarial:
        return print_adversarial([n for n in a.orders if 16 <= n <= 128 and n in (16, 64, 128)], 4, a.json)
    if not a.json:
        print("| n | dtype | auto us | jacobi us | lapack us | torch us | auto/torch |", "|" + "---|" * 7, sep="\n")
    for n, dtype in product(a.orders, (torch.float32, torch.float64)):
        torch.manual_seed(0)
        x = torch.randn(a.count, n, 2 * n).to(a.device, dtype)
        timings = runner.interleave(variants(x @ x.mT), a.rounds)
        case = {"n": n, "count": a.count, "dtype": str(dtype).removeprefix("torch."), "device": a.device}
        if a.json:
            print("\n".join(runner.result_lines("batched_eigh", case, timings, {})), flush=True)
            continue
        each = {name: 1e6 * t.wall / a.count for name, t in timings.items()}
        cells = [f"{each[name]:.1f}" if name in each else "" for name in SOLVERS]
        print(f"| {n} | {case['dtype']} | {' | '.join(cells)} | {each['auto'] / each['torch']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
