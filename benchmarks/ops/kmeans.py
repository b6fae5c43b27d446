"""kmeans_assign beside the bare products, eager, torch.compile and cdist.

    python -m benchmarks kmeans [--points 20000 --centroids 2048 --dim 64 --m 1 16]

`products`, the floor, is torch.mm of the same tiles into a buffer that stays in cache: what no assignment can avoid.
`eager` takes all N x K products in chunks of rows that fit 256 MiB, then argmax (top-k for m > 1), `cdist` likewise.
The last two are one update: kmeans_update (sort and segmented mean), and index_add, its floor.
"""

from collections.abc import Callable, Sequence

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness  # isort: skip

import torch
from torch import Tensor

from benchmarks.case import Axis, Case, Op, Prepared, Run, Scaling, Terms, Work, WrongResult, compiled, hold, item_bytes
from effkern import kmeans_assign, kmeans_update
from effkern.ops.kmeans import chunks, reference

EAGER_BYTES = 1 << 28
CHECK_POINTS = 512


def make(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    points = torch.randn(case["points"], case["dim"], device=case["device"]).to(dtype)
    centroids = torch.randn(case["centroids"], case["dim"], device=case["device"]).to(dtype)
    return points, centroids


def scores(points: Tensor, centroids: Tensor, half: Tensor, m: int) -> Tensor:
    products = points @ centroids.t() - half
    return products.argmax(1, keepdim=True) if m == 1 else products.topk(m, 1).indices


def check(case: Case) -> None:
    points, centroids = make({**case, "points": min(case["points"], CHECK_POINTS)})
    found = kmeans_assign(points, centroids, m=case["m"])
    wide, m, num = points.double(), case["m"], case["centroids"]
    _, truth = reference.assign(wide, centroids.double(), m)
    # Distances to the centroids that the labels name, as of two that are as near either may come first.
    named = (wide[:, None] - centroids.double()[found.labels]).square().sum(2)
    hold([(found.distance, truth), (named, truth)], 1e-5)
    if found.labels.sort(1).values.diff(dim=1).eq(0).any():
        raise WrongResult("wrong result: one centroid twice among the nearest of a point; nothing is timed")
    # Several points of one cluster, and clusters of none.
    labels = found.labels[:, 0] // 2
    counts = torch.bincount(labels, minlength=num)
    means = wide.new_zeros(num, wide.shape[1]).index_add_(0, labels, wide) / counts.clamp_min(1)[:, None]
    centers, sizes = kmeans_update(points.float(), labels, num)
    hold([(centers, means), (sizes, counts.double())], 1e-5)


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    points, centroids = make(case)
    m, num = case["m"], case["centroids"]
    half = centroids.float().square().sum(1).to(points.dtype) / 2
    rows = max(1, EAGER_BYTES // (num * 4))
    columns = min(chunks.TILE_CENTROIDS, num)
    tile = max(1, chunks.TILE_BYTES // (4 * columns))
    buffer = torch.empty(tile, columns, dtype=points.dtype, device=points.device)
    labels = kmeans_assign(points, centroids).labels[:, 0]
    wide = points.float()

    def by_rows(function: Callable[[Tensor], Tensor]) -> Run:
        return lambda: torch.cat([function(part) for part in points.split(rows)])

    def products() -> None:
        for part in points.split(tile):
            for some in centroids.split(columns):
                torch.mm(part, some.t(), out=buffer[: len(part), : len(some)])

    def index_add() -> Tensor:
        sums = wide.new_zeros(num, wide.shape[1]).index_add_(0, labels, wide)
        return sums / torch.bincount(labels, minlength=num).clamp_min(1)[:, None]

    def distances(part: Tensor) -> Tensor:
        found = torch.cdist(part.float(), centroids.float())
        return found.argmin(1, keepdim=True) if m == 1 else found.topk(m, 1, largest=False).indices

    made: dict[str, Run] = {
        "products": products,
        "effkern": lambda: kmeans_assign(points, centroids, m=m),
        "eager": by_rows(lambda part: scores(part, centroids, half, m)),
        "torch.compile": by_rows(lambda part: compiled(scores)(part, centroids, half, m)),
        "cdist": by_rows(distances),
        "effkern update": lambda: kmeans_update(wide, labels, num),
        "index_add": index_add,
    }
    return Prepared({name: made[name] for name in names})


def work(case: Case) -> Work:
    points, num, dim, size = case["points"], case["centroids"], case["dim"], item_bytes(case["dtype"])
    moved = (points + num) * dim * size + 12 * points * case["m"]
    return Work(moved, 2.0 * points * num * dim, case["dtype"])


def update_work(case: Case) -> Work:
    return Work(4 * (case["points"] + case["centroids"]) * case["dim"] + 8 * case["points"])


def floor(variant: str) -> Terms:
    return {"index_add" if variant in ("effkern update", "index_add") else "products": 1.0}


SCALED = {"points": 2000, "centroids": 256, "dim": 64, "m": 1, "dtype": "float32"}
OP = Op(
    name="kmeans",
    doc=__doc__,
    axes=(
        Axis("points", "--points", (20000,)),
        Axis("centroids", "--centroids", (2048,)),
        Axis("dim", "--dim", (64,)),
        Axis("m", "--m", (1, 16)),
        Axis("dtype", "--dtypes", ("float32",), ("float32", "bfloat16")),
    ),
    variants=("products", "effkern", "eager", "torch.compile", "cdist", "effkern update", "index_add"),
    check=check,
    prepare=prepare,
    work=work,
    works=lambda case: {"effkern update": update_work(case), "index_add": update_work(case)},
    floor=floor,
    registry=("kmeans",),
    scaling=(
        Scaling("points", (1000, 2000, 4000, 8000, 16000), SCALED, "1: every point costs the same"),
        Scaling("centroids", (128, 256, 512, 1024, 2048), SCALED, "1: every centroid costs the same"),
    ),
    no_huge="N x K is never indexed: a tile is at most 2 MiB, and rows are 64-bit products",
)

if __name__ == "__main__":
    harness.main(OP)
