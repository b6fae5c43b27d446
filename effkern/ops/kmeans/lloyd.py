"""Lloyd's iteration: the deterministic update, and the loop with reseeding of empty clusters."""

from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.kmeans.api import Assignment, kmeans_assign
from effkern.ops.mean_pool import mean_pool


class KMeans(NamedTuple):
    """See kmeans."""

    centroids: Tensor
    """float32 (float64) [K, D]; those of the last update."""
    labels: Tensor
    """int64 [N]: nearest of `centroids`."""
    distance: Tensor
    """Squared, to that centroid, [N]."""
    inertia: list[float]
    """Sum of squared distances before each update and at the end; never rises beyond rounding."""


def kmeans_update(points_ND: Tensor, labels: Tensor, num_clusters: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Mean of the points of each cluster, and their number: sort by label, then a segmented mean.

    Args:
        points_ND: as for `mean_pool`.
        labels: int64, [N], each in [-1, K); -1 is in no cluster.
        num_clusters: K.
        impl: as for `mean_pool`.

    Returns:
        centroids [K, D], float32 (float64), 0 for an empty cluster, and counts, int64 [K].

    Raises:
        ValueError: labels have another length, or are out of range (looked at on the CPU).

    Memory: O(N + K D). Deterministic: the order of the additions follows from labels alone.
    """
    if labels.shape != points_ND.shape[:1] or labels.dtype != torch.int64:
        got = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"kmeans_update: labels must be int64 [{points_ND.shape[0]}], got {got}")
    if labels.device.type == "cpu" and labels.numel():
        low, high = (int(x) for x in labels.aminmax())
        if low < -1 or high >= num_clusters:
            raise ValueError(f"kmeans_update: labels must lie in [-1, {num_clusters}), got {low} to {high}")
    # Group 0 holds the points of no cluster.
    groups, order = (labels + 1).sort(stable=True)
    offsets = torch.searchsorted(groups, torch.arange(num_clusters + 2, device=labels.device))
    return mean_pool(points_ND, order, offsets, impl=impl)[1:], offsets.diff()[1:]


def kmeans(points_ND: Tensor, num_clusters: int, *, iterations: int = 20, seed: int = 0, impl: str = "auto") -> KMeans:
    """Lloyd's algorithm from `num_clusters` points drawn without replacement.

    An empty cluster is put on the point farthest from its own centroid; several take the farthest several, each one's
    own. Ends early once no label changes.

    Args:
        points_ND: as for `kmeans_assign`, finite.
        num_clusters: K, in [1, N].
        iterations: updates at most, at least 1.
        seed: of the draw.
        impl: as for `kmeans_assign`.

    Raises:
        ValueError: num_clusters or iterations is out of range, or a point is not finite.
        Further: as for `kmeans_assign`.

    Memory: O(N + K D) besides the points. Deterministic.
    """
    if not 1 <= num_clusters <= len(points_ND):
        raise ValueError(f"kmeans: num_clusters must lie in [1, {len(points_ND)}], got {num_clusters}")
    if iterations < 1:
        raise ValueError(f"kmeans: iterations must be at least 1, got {iterations}")
    points_ND = points_ND.detach()
    first = torch.randperm(len(points_ND), generator=torch.Generator().manual_seed(seed))[:num_clusters]
    centroids = points_ND[first.sort().values.to(points_ND.device)]
    found = kmeans_assign(points_ND, centroids, impl=impl)
    if found.distance.isfinite().logical_not().any():
        raise ValueError("kmeans: points must be finite, got NaN or inf")
    inertia = [float(found.distance.double().sum())]
    for _ in range(iterations):
        labels = found.labels[:, 0]
        means, counts = kmeans_update(points_ND, labels, num_clusters, impl=impl)
        centroids = _reseed(points_ND, means.to(points_ND.dtype), counts, found)
        found = kmeans_assign(points_ND, centroids, impl=impl)
        inertia.append(float(found.distance.double().sum()))
        if torch.equal(labels, found.labels[:, 0]):
            break
    wide = centroids.to(torch.promote_types(centroids.dtype, torch.float32))
    return KMeans(wide, found.labels[:, 0], found.distance[:, 0], inertia)


def _reseed(points_ND: Tensor, means_KD: Tensor, counts_K: Tensor, found: Assignment) -> Tensor:
    empty = (counts_K == 0).nonzero().flatten()
    if empty.numel():
        far = found.distance[:, 0].sort(descending=True, stable=True).indices[: empty.numel()]
        means_KD[empty] = points_ND[far]
    return means_KD
