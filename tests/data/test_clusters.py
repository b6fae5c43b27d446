"""Clusterings and their scores: contracts by property, both implementations, and known cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effkern.data import fallback, kernels
from effkern.data.curation import (
    Dendrogram,
    balanced_kmeans,
    cluster_scores,
    diameter_clusters,
    fit_projection,
    medoids,
)
from effkern.data.curation.balanced import bounds
from effkern.native import load

BOTH = pytest.mark.parametrize("native", [
    pytest.param(True, marks=pytest.mark.skipif(load("_data") is not None, reason=str(load("_data")))), False
])  # fmt: skip


@pytest.fixture
def implementation(native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels, "_native", fallback)


def cloud(num: int, dim: int, seed: int, distinct: int | None = None) -> np.ndarray:
    """Points in lumps; with `distinct` many are equal."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(max(1, num // 6), dim))
    points = centers[rng.integers(len(centers), size=num)] + 0.2 * rng.normal(size=(num, dim))
    if distinct:
        points = points[rng.integers(min(distinct, num), size=num)]
    return points.astype(np.float32)


def square(points: np.ndarray) -> np.ndarray:
    wide = points.astype(np.float64)
    return ((wide[:, None] - wide) ** 2).sum(2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    num=st.integers(1, 60), dim=st.integers(1, 5), seed=st.integers(0, 99), k=st.integers(1, 12), equal=st.booleans()
)
def test_no_pair_of_a_cluster_is_beyond_eps(num, dim, seed, k, equal):
    """At every height: all pairs within eps, clusters nested as it grows, their number as promised."""
    points = cloud(num, dim, seed, 4 if equal else None)
    found = diameter_clusters(torch.from_numpy(points), neighbors=k)
    assert (np.diff(found.heights) >= 0).all()
    distance, finer = square(points), np.arange(num)
    for eps in [0.0, *found.heights[:: max(1, len(found.heights) // 6)], np.inf]:
        labels = found.cut(eps)
        assert labels.max() + 1 == found.num_clusters(eps)
        same = labels[:, None] == labels
        assert distance[same].max() <= eps + 1e-12
        # Each finer cluster lies in one coarser one.
        assert len({(a, b) for a, b in zip(finer.tolist(), labels.tolist())}) == finer.max() + 1
        finer = labels


@BOTH
def test_the_whole_graph_gives_complete_linkage(native, implementation):
    """With all neighbors: the textbook algorithm, which merges the closest two clusters again and again."""
    points = cloud(24, 3, 1)
    found = diameter_clusters(torch.from_numpy(points), neighbors=23)
    distance = square(points)
    clusters, heights = [[i] for i in range(24)], []
    while len(clusters) > 1:
        pairs = [
            (distance[np.ix_(a, b)].max(), i, j)
            for i, a in enumerate(clusters) for j, b in enumerate(clusters) if i < j
        ]  # fmt: skip
        height, i, j = min(pairs)
        heights.append(height)
        clusters[i] += clusters.pop(j)
    np.testing.assert_allclose(found.heights, heights, rtol=1e-12)
    assert len(set(found.cut(np.inf).tolist())) == 1


@pytest.mark.skipif(load("_data") is not None, reason=str(load("_data")))
@pytest.mark.parametrize(("k", "most"), [(2, np.inf), (6, 0.5), (40, np.inf)])
def test_compiled_and_plain_merge_alike(k, most):
    points = cloud(80, 4, 7)
    near = np.argsort(square(points), axis=1)[:, :k].astype(np.int64)
    near[3, -1] = -1
    ours, plain = (module.complete_linkage(points, near, most) for module in (kernels, fallback))
    np.testing.assert_array_equal(np.sort(ours[0]), np.sort(plain[0]))
    np.testing.assert_allclose(np.sort(ours[2]), np.sort(plain[2]), rtol=1e-12)
    order = [np.lexsort(part[:2]) for part in (ours, plain)]
    for a, b in zip(ours[:2], plain[:2]):
        np.testing.assert_array_equal(a[order[0]], b[order[1]])
    assert ours[2].max() <= most


def test_points_that_the_graph_does_not_join_stay_apart():
    points = np.array([[0.0], [0.1], [5.0], [5.1]], np.float32)
    found = diameter_clusters(torch.from_numpy(points), neighbors=1)
    assert found.cut(np.inf).tolist() == [0, 0, 1, 1]
    limited = diameter_clusters(torch.from_numpy(points), neighbors=3, max_diameter=0.005)
    assert limited.cut(np.inf).tolist() == [0, 1, 2, 3]


def test_eps_of_a_budget():
    """The largest height that leaves enough clusters; equal heights are taken together."""
    merges = np.array([[0, 1], [2, 3], [4, 5], [0, 2]])
    tree = Dendrogram(6, merges, np.array([0.1, 0.2, 0.2, 0.7]))
    assert [tree.num_clusters(eps) for eps in (0.0, 0.1, 0.2, 0.5, 0.7)] == [6, 5, 3, 3, 2]
    assert [tree.eps_for(budget) for budget in (6, 5, 4, 3, 2, 1)] == [0.0, 0.1, 0.1, 0.2, 0.7, 0.7]
    for budget in (0, 7):
        with pytest.raises(ValueError, match=rf"budget must lie in \[1, 6\], the corpus, got {budget}"):
            tree.eps_for(budget)


def test_medoids_are_nearest_to_the_mean():
    points = np.array([[0.0], [1.0], [5.0], [9.0], [9.0]], np.float32)
    assert medoids(points, np.array([0, 0, 0, 1, 1])).tolist() == [1, 3]
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(90, 3)).astype(np.float32), np.sort(rng.integers(7, size=90))
    for k, found in enumerate(medoids(x, labels).tolist()):
        rows = np.flatnonzero(labels == k)
        assert found == rows[((x[rows] - x[rows].mean(0)) ** 2).sum(1).argmin()]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(num=st.integers(1, 120), size=st.integers(1, 30), seed=st.integers(0, 99), equal=st.booleans())
def test_balanced_sizes(num, size, seed, equal):
    """n/5 <= |C| <= 5n, every example in one cluster, whatever the points; equal ones are the hardest."""
    points = torch.from_numpy(cloud(num, 3, seed, 2 if equal else None))
    if size > 5 * num:
        with pytest.raises(ValueError, match=rf"size must lie in \[1, {5 * num}\]"):
            balanced_kmeans(points, size)
        return
    labels = balanced_kmeans(points, size, iterations=4, seed=seed)
    counts = np.bincount(labels)
    least, most = bounds(size)
    assert labels.shape == (num,)
    assert least <= counts.min()
    assert counts.max() <= most
    assert size / 5 <= counts.min()
    np.testing.assert_array_equal(labels, balanced_kmeans(points, size, iterations=4, seed=seed))


def test_balanced_clusters_follow_the_points():
    """Ten tight lumps of 20: clusters hold one lump each, up to what K-means from drawn points splits and joins."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(10), 20)
    points = 20 * rng.normal(size=(10, 4))[truth] + 0.01 * rng.normal(size=(200, 4))
    purity = [
        cluster_scores(balanced_kmeans(torch.from_numpy(points.astype(np.float32)), 20, seed=seed), points[:, 0], truth)
        for seed in range(5)
    ]
    assert np.mean([found.purity for found in purity]) > 0.85
    drawn = cluster_scores(rng.integers(10, size=200), points[:, 0], truth)
    assert drawn.purity < 0.3


@BOTH
def test_scores_by_hand(native, implementation):
    labels = np.array([0, 0, 1, 1, 1, 2, -1])
    losses = np.array([1.0, 3.0, 2.0, 2.0, 5.0, 9.0, 100.0])
    found = cluster_scores(labels, losses, np.array([0, 0, 0, 1, 1, 1, 0]))
    within = [np.var([1, 3], ddof=1), np.var([2, 2, 5], ddof=1)]
    assert found.variance_reduction == pytest.approx(np.var(losses[:6], ddof=1) / np.mean(within))
    assert found.purity == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert (found.clusters, found.smallest, found.largest) == (3, 1, 3)
    assert np.isnan(cluster_scores(np.arange(2), np.ones(2), np.zeros(2, int)).variance_reduction)
    with pytest.raises(ValueError, match="labels must put an example into a cluster"):
        cluster_scores(np.array([-1]), np.ones(1), np.zeros(1, int))
    with pytest.raises(ValueError, match="losses must be finite"):
        cluster_scores(np.array([0]), np.array([np.nan]), np.zeros(1, int))
    with pytest.raises(ValueError, match="labels and sources must be below 1 and 1, got 1 and 0"):
        kernels.segment_stats(np.array([1]), np.ones(1), np.zeros(1, int), 1, 1)
    with pytest.raises(ValueError, match="vectors of one length"):
        kernels.segment_stats(np.array([0]), np.ones(2), np.zeros(1, int), 1, 1)


@BOTH
def test_a_random_partition_scores_one(native, implementation):
    """VR 1.00 +- 0.02 whatever the size of the clusters, and far from 0 losses; true clusters score far above."""
    rng = np.random.default_rng(0)
    losses, sources = 1e4 + rng.normal(size=40_000), rng.integers(4, size=40_000)
    for clusters in (500, 4000):
        found = cluster_scores(rng.integers(clusters, size=40_000), losses, sources)
        assert found.variance_reduction == pytest.approx(1.0, abs=0.02)
    by_loss = np.argsort(np.argsort(losses)) // 40
    assert cluster_scores(by_loss, losses, sources).variance_reduction > 50
    assert cluster_scores(sources.astype(np.int64), losses, sources).purity == 1.0


def test_projection_standardises_and_keeps_the_largest_variance():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(400, 2)) @ rng.normal(size=(2, 9)) * 3 + 0.05 * rng.normal(size=(400, 9)) + 7
    x = np.concatenate([hidden, np.full((400, 1), 2.5)], 1)
    found = fit_projection(x, 2)
    z = (x - x.mean(0)) / np.where(x.std(0) > 1e-9, x.std(0), 1)
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(2), atol=1e-12)
    top = np.linalg.svd(z, full_matrices=False)[1][:2] ** 2
    assert found.explained == pytest.approx(top.sum() / (z**2).sum())
    assert found.explained > 0.95
    unit = z @ found.components.T
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    np.testing.assert_allclose(found(x), unit, atol=1e-6)
    assert not found(x.mean(0, keepdims=True)).any()
    for components in (0, 11):
        with pytest.raises(ValueError, match=rf"components must lie in \[1, 10\] .*, got {components}"):
            fit_projection(x, components)
    with pytest.raises(ValueError, match="embeddings must be finite"):
        fit_projection(np.full((9, 3), np.nan), 1)
