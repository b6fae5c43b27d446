"""batched_eigh beside torch.linalg.eigh, and its errors on hard matrices.

    python -m benchmarks.ops.batched_eigh                      time per matrix, n = 4 ... 128, both dtypes
    python -m benchmarks.ops.batched_eigh --adversarial        errors of all solvers on hard matrices

The floor is torch.linalg.eigh. FLOPs count the reduction to tridiagonal form (4/3 n^3) and the vectors' way back
from it (2 n^3), not the iteration between.
Errors are in units of n eps: backward |A - Q diag(w) Q^T| / |A|, orthogonality |Q^T Q - I|, Frobenius norms, the worst
matrix of a batch; `relative` is the largest relative error of an eigenvalue against float64, for float32 matrices.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness, runner  # isort: skip

import torch
from torch import Tensor

from benchmarks.case import Axis, Case, Huge, Op, Prepared, Scaling, Work, WrongResult, item_bytes
from effkern import batched_eigh
from effkern.ops.batched_eigh.api import MAX_ORDER

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


def make(case: Case) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(case["count"], case["n"], 2 * case["n"]).to(case["device"], getattr(torch, case["dtype"]))
    return x @ x.mT


def check(case: Case) -> None:
    """Backward error and orthogonality of each solver on a few matrices, within the bound that the op states."""
    a = make({**case, "count": min(case["count"], 8)})
    for name, solver in SOLVERS.items():
        if (name == "lapack" and a.is_cuda) or (name == "jacobi" and case["n"] > MAX_ORDER):
            continue
        found = errors(a, solver)
        if found["status"] != [0] or not max(found["backward"], found["orthogonality"]) <= 4:
            raise WrongResult(f"wrong result of {name}: {found}; nothing is timed")


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    a = make(case)
    left_out = {"lapack"} if a.is_cuda else set()
    left_out |= {"jacobi"} if case["n"] > MAX_ORDER else set()
    return Prepared({n: lambda o=SOLVERS[n]: batched_eigh(a, **o) for n in names if n not in left_out})  # type: ignore[misc]


def work(case: Case) -> Work:
    n, count = case["n"], case["count"]
    return Work((2 * n * n + n) * count * item_bytes(case["dtype"]), 10 / 3 * n**3 * count, case["dtype"])


def why(case: Case) -> list[str]:
    """The C++ side decides; its choice shows in equal bits."""
    if case["device"] != "cpu":
        return [f"one block per matrix up to n = {MAX_ORDER}, torch.linalg.eigh above"]
    a = make({**case, "count": 2})
    auto = batched_eigh(a).vectors
    same = [m for m in ("jacobi", "lapack") if (m == "lapack" or case["n"] <= MAX_ORDER)
            and torch.equal(batched_eigh(a, method=m).vectors, auto)]  # fmt: skip
    return [f'method="auto" is {" or ".join(same)} at n = {case["n"]}: the faster one as measured when it was set']


def huge() -> Huge:
    """More than 2^31 numbers in the batch: the last matrices must be what they are alone."""
    n = 8
    count = (1 << 31) // n**2 + 16

    def run() -> None:
        a = make({"n": n, "count": 16, "dtype": "float32", "device": "cpu"})
        wide, alone = batched_eigh(a.repeat(count // 16, 1, 1)), batched_eigh(a)
        if not torch.equal(wide.values[-16:], alone.values) or not torch.equal(wide.vectors[-16:], alone.vectors):
            raise WrongResult("wrong result of the last matrices")

    return Huge((2 * n * n + n) * count * 4, f"{count} matrices of order {n}, float32", run)


def print_errors(a: argparse.Namespace) -> bool:
    if a.adversarial:
        print_adversarial([n for n in a.n if n in (16, 64, 128)], 4, a.json)
    return a.adversarial


OP = Op(
    name="batched_eigh",
    doc=__doc__,
    axes=(
        Axis("n", "--orders", (4, 8, 16, 24, 32, 48, 64, 128)),
        Axis("count", "--count", (128,)),
        Axis("dtype", "--dtypes", ("float32", "float64"), ("float32", "float64")),
    ),
    variants=tuple(SOLVERS),
    check=check,
    prepare=prepare,
    work=work,
    floor={"torch": 1.0},
    ours="auto",
    registry=("batched_eigh",),
    why=why,
    options=lambda parser: parser.add_argument("--adversarial", action="store_true"),
    instead=print_errors,
    rounds=7,
    scaling=(
        Scaling("n", (8, 16, 32, 64, 128), {"count": 32, "dtype": "float32"}, "3: n^3 a matrix, less where n is small"),
        Scaling("count", (16, 32, 64, 128, 256), {"n": 16, "dtype": "float32"}, "1: every matrix costs the same"),
    ),
    huge=huge,
)

if __name__ == "__main__":
    harness.main(OP)
