"""kmeans_assign against float64 and bit for bit on whole numbers, the update, and Lloyd's iteration."""

from itertools import pairwise

import pytest
import torch

from effkern import kmeans, kmeans_assign, kmeans_update, native
from effkern.ops import registry
from effkern.ops.kmeans.api import _choose
from tests.numerics import rel_err

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = [
    i.name for i in registry.registered()["kmeans"] if i.unavailable(torch.device(DEVICE)) is None
    or i.unavailable(CPU) is None
]  # fmt: skip
IMPL = pytest.mark.parametrize("impl", IMPLS)
COMPILED = pytest.mark.skipif(native.load("_C") is not None, reason=str(native.load("_C")))


def home(impl: str) -> str:
    return "cpu" if impl == "cpp" else DEVICE


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles in each direction."""
    from effkern.ops.kmeans import chunks

    monkeypatch.setattr(chunks, "TILE_CENTROIDS", 40)
    if "triton" in IMPLS:
        from effkern.ops.kmeans import triton as launcher

        monkeypatch.setattr(launcher, "blocks", lambda dtype: {"BLOCK_N": 32, "BLOCK_K": 16, "BLOCK_D": 16})
        if DEVICE == "cpu":
            from tests.interpreter import exact_bfloat16

            exact_bfloat16(monkeypatch)


def exact(points: torch.Tensor, centroids: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All distances in float64; equal ones in the order of their indices."""
    square = (points.double()[:, None] - centroids.double()).square().sum(2)
    found = square.sort(dim=1, stable=True)
    return found.indices[:, :m], found.values[:, :m]


# Below one tile with one column; several tiles whose last is not full; m = 1 and lists, up to all centroids.
@pytest.mark.parametrize(("points", "centroids", "dim", "m"), [
    (5, 3, 1, 1), (70, 97, 20, 1), (70, 97, 20, 5), (33, 64, 16, 33), (40, 6, 33, 6)
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@IMPL
def test_whole_numbers_are_exact(impl, dtype, points, centroids, dim, m):
    """Small whole numbers have exact scores with many ties: labels and distances equal bit for bit."""
    where = home(impl)
    x, c = (torch.randint(-2, 3, (n, dim)).to(dtype) for n in (points, centroids))
    found = kmeans_assign(x.to(where), c.to(where), m=m, impl=impl, chunk_bytes=4096)
    labels, distance = exact(x, c, m)
    assert torch.equal(found.labels.cpu(), labels)
    assert torch.equal(found.distance.cpu(), distance.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 4])
@IMPL
def test_near_the_truth(impl, m, dtype):
    """What is chosen is at most a rounding farther than the truth; distances are right to |x|^2 2^-21."""
    where = home(impl)
    x, c = torch.randn(90, 24).to(dtype), torch.randn(50, 24).to(dtype)
    found = kmeans_assign(x.to(where), c.to(where), m=m, impl=impl)
    square = (x.double()[:, None] - c.double()).square().sum(2)
    bound = 2.0**-21 * x.double().square().sum(1, keepdim=True)
    labels, distance = found.labels.cpu(), found.distance.cpu().double()
    assert ((square.gather(1, labels) - square.sort(1).values[:, :m]).abs() <= bound).all()
    assert ((distance - square.gather(1, labels)).abs() <= bound).all()
    assert all(len(set(row)) == m for row in labels.tolist())


@IMPL
def test_nan_and_too_few(impl):
    """NaN is never chosen; a point of NaN has no label; what is missing in a list is -1 and NaN."""
    where = home(impl)
    x, c = torch.randn(6, 3), torch.randn(4, 3)
    truth = exact(x, c[[0, 2]], 2)
    c[[1, 3]] = torch.tensor([float("nan"), 0.0, 0.0])
    x[4, 1] = float("nan")
    found = kmeans_assign(x.to(where), c.to(where), m=3, impl=impl)
    rows = [0, 1, 2, 3, 5]
    assert torch.equal(found.labels.cpu()[rows, :2], torch.tensor([0, 2])[truth[0][rows]])
    assert found.labels.cpu()[4].tolist() == [-1, -1, -1]
    assert found.distance.cpu()[4].isnan().all()
    assert (found.labels.cpu()[:, 2] == -1).all()
    assert found.distance.cpu()[:, 2].isnan().all()
    first = kmeans_assign(x.to(where), c.to(where), impl=impl)
    assert torch.equal(first.labels.cpu()[:, 0], found.labels.cpu()[:, 0])


@IMPL
def test_far_from_the_origin_no_distance_is_negative(impl):
    x = torch.randn(40, 8, device=home(impl)) + 300
    found = kmeans_assign(x, x[:20].contiguous(), impl=impl)
    assert (found.distance >= 0).all()
    assert (found.distance[:20] <= 300 * 300 * 8 * 2.0**-20).all()


@IMPL
def test_strided_points_and_none(impl):
    wide = torch.randn(30, 20, device=home(impl))
    x, c = wide[:, :7], wide[:9, 7:14]
    found = kmeans_assign(x, c, m=2, impl=impl)
    assert torch.equal(found.labels, kmeans_assign(x.contiguous(), c.contiguous(), m=2, impl=impl).labels)
    assert kmeans_assign(x[:0], c, m=2, impl=impl).labels.shape == (0, 2)


@COMPILED
def test_cpp_bits_do_not_depend_on_threads_or_tiles():
    x, c = torch.randn(3000, 16), torch.randn(300, 16)
    threads, found = torch.get_num_threads(), []
    try:
        for count, budget in ((1, None), (2, None), (3, 1 << 14), (1, 1 << 12)):
            torch.set_num_threads(count)
            found.append(kmeans_assign(x, c, m=3, impl="cpp", chunk_bytes=budget))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0].labels, other.labels)
        assert rel_err(other.distance, found[0].distance.double()) < 1e-6


@IMPL
def test_update_is_the_mean(impl):
    where = home(impl)
    x, labels = torch.randn(200, 9), torch.randint(-1, 12, (200,))
    labels[labels == 5] = 6
    means, counts = kmeans_update(x.to(where), labels.to(where), 12, impl=impl)
    for k in range(12):
        rows = x[labels == k].double()
        assert counts[k] == len(rows)
        truth = rows.mean(0) if len(rows) else torch.zeros(9, dtype=torch.float64)
        assert rel_err(means[k].cpu(), truth) < 1e-6 if len(rows) else not means[k].any()
    # The order of the points within a cluster counts, that of other clusters' points does not.
    order = (labels % 2).sort(stable=True).indices
    again, _ = kmeans_update(x[order].to(where), labels[order].to(where), 12, impl=impl)
    assert torch.equal(means, again)


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "triton" or DEVICE == "cuda"])
def test_lloyd_finds_clusters_and_never_gets_worse(impl):
    where = home(impl)
    centers = 10 * torch.randn(5, 6)
    x = (centers.repeat_interleave(30, 0) + 0.1 * torch.randn(150, 6)).to(where)
    best = min((kmeans(x, 5, seed=seed, impl=impl) for seed in range(6)), key=lambda found: found.inertia[-1])
    truth = torch.arange(5).repeat_interleave(30)
    pairs = {(a, b) for a, b in zip(truth.tolist(), best.labels.tolist())}
    assert len(pairs) == 5
    y = torch.randn(150, 6, device=where)
    found = kmeans(y, 12, iterations=30, impl=impl)
    steps = found.inertia
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(steps))
    assert steps[-1] < 0.8 * steps[0]
    again = kmeans_assign(y, found.centroids, impl=impl)
    assert torch.equal(found.labels, again.labels[:, 0])
    assert torch.equal(found.distance, again.distance[:, 0])


@IMPL
def test_empty_clusters_are_reseeded(impl):
    """Three distinct places, equal points drawn more than once: no cluster stays empty while a point is off its own."""
    where = home(impl)
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = torch.cat([places[:1].repeat(50, 1), places[1:2].repeat(3, 1), places[2:].repeat(2, 1)]).to(where)
    for seed in range(2 if impl == "triton" else 6):
        found = kmeans(x, 3, seed=seed, impl=impl)
        assert found.inertia[-1] == 0.0
        assert found.labels.unique().numel() == 3


def test_lloyd_is_deterministic():
    x = torch.randn(300, 5)
    a, b = kmeans(x, 20, seed=3), kmeans(x, 20, seed=3)
    assert torch.equal(a.centroids, b.centroids)
    assert torch.equal(a.labels, b.labels)
    assert a.inertia == b.inertia
    assert not torch.equal(a.labels, kmeans(x, 20, seed=4).labels)


def test_reference_takes_float64():
    x, c = torch.randn(20, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    found = kmeans_assign(x, c, m=2)
    labels, distance = exact(x, c, 2)
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.distance, distance, rtol=1e-12, atol=1e-12)
    for name in [n for n in IMPLS if n != "reference"]:
        with pytest.raises(NotImplementedError, match=f"impl='{name}' does not cover float64"):
            kmeans_assign(x.to(home(name)), c.to(home(name)), impl=name)


@IMPL
def test_compile(impl):
    x, c = torch.randn(20, 16, device=home(impl)), torch.randn(7, 16, device=home(impl))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def assign(x, c):
        return kmeans_assign(x, c, m=2, impl=impl)

    torch.testing.assert_close(assign(x, c), kmeans_assign(x, c, m=2, impl=impl))


def test_operators():
    for name in [n for n in IMPLS if n != "reference"]:
        x, c = torch.randn(20, 16, device=home(name)), torch.randn(7, 16, device=home(name))
        torch.library.opcheck(torch.ops.effkern.kmeans_assign, (x, c, 2, name, None))
    if native.load("_C") is None:
        best, labels = torch.full((4, 2), -torch.inf), torch.full((4, 2), -1)
        torch.library.opcheck(torch.ops.effkern.kmeans_merge, (torch.randn(4, 9), torch.rand(9), 3, best, labels))


@COMPILED
def test_cpp_errors_of_the_operators():
    merge = torch.ops.effkern.kmeans_merge
    products, half, best, labels = torch.randn(4, 9), torch.rand(9), torch.zeros(4, 2), torch.zeros(4, 2).long()
    for given, message in (
        ((products.double(), half, 0, best, labels), "products must be float32"),
        ((products.t(), half, 0, best, labels), "products must be float32"),
        ((products, half[1:], 0, best, labels), r"half_norms must be contiguous float32 \[9\]"),
        ((products, half, 0, best[1:], labels), "best and labels must be contiguous"),
        ((products, half, 0, best, labels.int()), "best and labels must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            merge(*given)


def test_choice():
    assert _choose("auto", torch.zeros(1, 1)) == ("cpp" if native.load("_C") is None else "reference")


ERRORS = [
    ({"points": None}, TypeError, "points must be a tensor, got NoneType"),
    ({"points": torch.zeros(3, 2).int()}, TypeError, "points must be float32, .* got torch.int32"),
    ({"points": torch.zeros(3)}, ValueError, r"points must have two dimensions and a column, got shape \[3\]"),
    ({"points": torch.zeros(2, 3).t()}, ValueError, "points must have stride 1 along its columns, got 3"),
    ({"centroids": torch.zeros(3, 2).half()}, TypeError, "centroids must have the dtype of points"),
    ({"centroids": torch.zeros(3, 1)}, ValueError, "centroids must have 2 columns, got 1"),
    ({"centroids": torch.zeros(3, 2, device="meta")}, ValueError, "centroids must be on cpu, got meta"),
    ({"centroids": torch.zeros(0, 2)}, ValueError, r"m must lie in \[1, 0\], got 1"),
    ({"m": 4}, ValueError, r"m must lie in \[1, 3\], got 4"),
    ({"m": True}, TypeError, "m must be an int, got bool"),
    ({"chunk_bytes": 0}, ValueError, "chunk_bytes must lie in"),
    ({"impl": "fast"}, ValueError, "impl must be one of"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_errors(changes, kind, message):
    given = {"points": torch.zeros(5, 2), "centroids": torch.zeros(3, 2)} | changes
    with pytest.raises(kind, match="kmeans(_assign)?: .*" + message):
        kmeans_assign(given.pop("points"), given.pop("centroids"), **given)


def test_errors_of_update_and_lloyd():
    x = torch.zeros(5, 2)
    for labels, message in (
        (torch.zeros(4).long(), r"labels must be int64 \[5\], got torch.int64 \[4\]"),
        (torch.zeros(5).int(), r"labels must be int64 \[5\], got torch.int32"),
        (torch.tensor([0, 1, 2, 3, 0]), r"labels must lie in \[-1, 3\), got 0 to 3"),
        (torch.tensor([0, -2, 2, 1, 0]), r"labels must lie in \[-1, 3\), got -2 to 2"),
    ):
        with pytest.raises(ValueError, match="kmeans_update: " + message):
            kmeans_update(x, labels, 3)
    for arguments, options, message in (
        ((x, 6), {}, r"num_clusters must lie in \[1, 5\], got 6"),
        ((x, 0), {}, r"num_clusters must lie in \[1, 5\], got 0"),
        ((x, 2), {"iterations": 0}, "iterations must be at least 1, got 0"),
        ((x + float("nan"), 2), {}, "points must be finite, got NaN or inf"),
    ):
        with pytest.raises(ValueError, match="kmeans: " + message):
            kmeans(*arguments, **options)
