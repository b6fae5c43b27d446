"""kmeans_assign beside the bare products, eager, torch.compile and cdist; and an update beside index_add.

    python -m benchmarks.ops.kmeans [--points 20000 --centroids 2048 --dim 64 --m 1 16]

`products` is torch.mm of the same tiles into a buffer that stays in cache: what no assignment can avoid. `eager` takes
all N x K products in chunks of rows that fit 256 MiB, then argmax (top-k for m > 1). GFLOP/s counts 2 N K D.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from benchmarks.ops.laurel import repeated
from effkern import kmeans_assign, kmeans_update
from effkern.ops.kmeans import chunks, reference

EAGER_BYTES = 1 << 28


def scores(points: Tensor, centroids: Tensor, half: Tensor, m: int) -> Tensor:
    products = points @ centroids.t() - half
    return products.argmax(1, keepdim=True) if m == 1 else products.topk(m, 1).indices


def assign_variants(points: Tensor, centroids: Tensor, m: int) -> dict[str, Callable[[], Any]]:
    half = centroids.float().square().sum(1).to(points.dtype) / 2
    rows = max(1, EAGER_BYTES // (len(centroids) * 4))
    columns = min(chunks.TILE_CENTROIDS, len(centroids))
    tile = max(1, chunks.TILE_BYTES // (4 * columns))
    buffer = torch.empty(tile, columns, dtype=points.dtype, device=points.device)
    compiled = torch.compile(scores)

    def by_rows(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.cat([function(part, centroids, half, m) for part in points.split(rows)])

    def products() -> None:
        for part in points.split(tile):
            for some in centroids.split(columns):
                torch.mm(part, some.t(), out=buffer[: len(part), : len(some)])

    found: dict[str, Callable[[], Any]] = {
        "products": products,
        "effkern": lambda: kmeans_assign(points, centroids, m=m),
        "eager": by_rows(scores),
        "torch.compile": by_rows(compiled),
    }
    if points.dtype == torch.float32 and m == 1:
        found["cdist"] = lambda: torch.cat([torch.cdist(part, centroids).argmin(1) for part in points.split(rows)])
    return found


def check(points: Tensor, centroids: Tensor, m: int) -> None:
    """No number on a wrong result."""
    some = points[:512]
    found = kmeans_assign(some, centroids, m=m)
    _, truth = reference.assign(some.double(), centroids.double(), m)
    if not torch.allclose(found.distance.double(), truth, rtol=1e-4, atol=1e-4):
        raise SystemExit("wrong result: nothing is timed")


def update_variants(points: Tensor, labels: Tensor, num: int) -> dict[str, Callable[[], Any]]:
    def index_add() -> Tensor:
        sums = points.new_zeros(num, points.shape[1]).index_add_(0, labels, points)
        return sums / torch.bincount(labels, minlength=num).clamp_min(1)[:, None]

    return {"effkern": lambda: kmeans_update(points, labels, num), "index_add": index_add}


def report(a: argparse.Namespace, case: dict[str, Any], variants: dict[str, Callable[[], Any]], floor: str) -> None:
    runs = {name: repeated(run) for name, run in variants.items()}
    timings = runner.interleave({name: run for name, (run, _) in runs.items()}, a.rounds)
    timings = {
        name: runner.Timing(*(s / runs[name][1] for s in (t.wall, t.wall_low, t.wall_high, t.cpu)))
        for name, t in timings.items()
    }
    if a.json:
        print("\n".join(runner.result_lines("kmeans", case, timings, {})), flush=True)
        return
    speed = f": {2e-9 * a.points * a.centroids * a.dim / timings['effkern'].wall:.0f} GFLOP/s" if case["m"] else ""
    print(f"{case}{speed}")
    print(runner.table(timings, floor, {}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20000)
    parser.add_argument("--centroids", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of tables")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if not a.json:
        print(json.dumps(runner.machine()))
    for name in a.dtypes:
        torch.manual_seed(0)
        points = torch.randn(a.points, a.dim, device=a.device).to(getattr(torch, name))
        centroids = points[: a.centroids].clone()
        case = {"dtype": name, "points": a.points, "centroids": a.centroids, "dim": a.dim, "device": a.device}
        for m in a.m:
            torch._dynamo.reset()
            check(points, centroids, m)
            report(a, {**case, "m": m}, assign_variants(points, centroids, m), "products")
        labels = kmeans_assign(points, centroids).labels[:, 0]
        # m = 0 stands for the update.
        report(a, {**case, "m": 0}, update_variants(points.float(), labels, a.centroids), "effkern")


if __name__ == "__main__":
    main()
