"""Balanced K-means: clusters of about `size` examples, none below a fifth of it, none above five times it."""

import numpy as np
import torch
from numpy.typing import NDArray

from effkern.ops.kmeans import kmeans, kmeans_assign

# Nearest clusters among which an example finds a place before the rest is searched.
CANDIDATES = 16


def bounds(size: int) -> tuple[int, int]:
    """Least and most examples of a cluster."""
    return -(-size // 5), 5 * size


def balanced_kmeans(
    points_ND: torch.Tensor, size: int, *, iterations: int = 20, seed: int = 0, impl: str = "auto"
) -> NDArray[np.int64]:
    """Labels 0 ... K - 1 of clusters with ceil(size / 5) to 5 size examples each.

    K-means with N / size clusters; then examples enter their nearest clusters in order of distance while there is
    room, and what finds none goes to the nearest cluster that has. Clusters that stay too small are dissolved, the
    smallest first, and their examples placed again; one that cannot be spared takes its nearest examples from clusters
    that can.

    Args:
        points_ND: float32 [N, D], finite; of length 1 after `Projection`.
        size: n, wanted mean size, at least 1.
        iterations, seed, impl: of `kmeans`.

    Raises:
        ValueError: size is below 1 or above 5 N.

    Memory: O(N m) for m = 16 candidates. Deterministic.
    Source: the bounds are those of arXiv 2502.02494; the algorithm, which the paper does not give, is our own.
    """
    num = len(points_ND)
    if not 1 <= size <= 5 * max(num, 0):
        raise ValueError(f"balanced_kmeans: size must lie in [1, {5 * num}] for {num} examples, got {size}")
    least, most = bounds(size)
    clusters = max(1, round(num / size))
    centroids = kmeans(points_ND, clusters, iterations=iterations, seed=seed, impl=impl).centroids.to(points_ND.dtype)
    labels = np.full(num, -1, np.int64)
    alive = np.arange(clusters)
    while True:
        _place(points_ND, centroids, alive, labels, most, impl)
        counts = np.bincount(labels, minlength=clusters)
        small = alive[counts[alive] < least]
        if not small.size:
            break
        # As many as can go while the rest has room for all.
        spare = len(alive) - -(-num // most)
        gone = small[np.argsort(counts[small], kind="stable")][: min(spare, max(1, small.size // 2))]
        if not gone.size:
            _fill(points_ND, centroids, labels, small, counts, least)
            break
        alive = np.setdiff1d(alive, gone)
        labels[np.isin(labels, gone)] = -1
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _place(
    points: torch.Tensor, centroids: torch.Tensor, alive: NDArray, labels: NDArray[np.int64], most: int, impl: str
) -> None:
    """Gives every example without a label one of a cluster in `alive` that has room."""
    room = np.zeros(len(centroids), np.int64)
    room[alive] = most - np.bincount(labels[labels >= 0], minlength=len(centroids))[alive]
    while (waiting := np.flatnonzero(labels < 0)).size:
        open_ = np.flatnonzero(room > 0)
        found = kmeans_assign(
            points[torch.from_numpy(waiting).to(points.device)],
            centroids[torch.from_numpy(open_).to(points.device)],
            m=min(CANDIDATES, len(open_)),
            impl=impl,
        )
        wanted, distance = open_[found.labels.cpu().numpy()], found.distance.cpu().numpy()
        for choice in range(wanted.shape[1]):
            left = np.flatnonzero(labels[waiting] < 0)
            _admit(waiting[left], wanted[left, choice], distance[left, choice], labels, room)


def _admit(
    examples: NDArray, clusters: NDArray, distance: NDArray, labels: NDArray[np.int64], room: NDArray[np.int64]
) -> None:
    """The nearest of those who want a cluster get its room."""
    order = np.lexsort((examples, distance, clusters))
    wanted = clusters[order]
    rank = np.arange(len(order)) - np.searchsorted(wanted, wanted)
    taken = rank < room[wanted]
    labels[examples[order[taken]]] = wanted[taken]
    np.subtract.at(room, wanted[taken], 1)


def _fill(
    points: torch.Tensor,
    centroids: torch.Tensor,
    labels: NDArray[np.int64],
    small: NDArray,
    counts: NDArray,
    least: int,
) -> None:
    for cluster in small.tolist():
        distance = (points.float() - centroids[cluster].float()).square().sum(1).cpu().numpy()
        for example in np.argsort(distance, kind="stable").tolist():
            if counts[cluster] >= least:
                break
            owner = labels[example]
            if owner != cluster and counts[owner] > least:
                counts[owner] -= 1
                counts[cluster] += 1
                labels[example] = cluster
