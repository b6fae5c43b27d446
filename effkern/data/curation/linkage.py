"""Clusters of bounded diameter, and a diverse selection from them."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from effkern.data.kernels import complete_linkage
from effkern.ops.kmeans import kmeans_assign


@dataclass(frozen=True)
class Dendrogram:
    """All merges of a bottom-up clustering; a cut at any height is a clustering, and cuts are nested.

    In a cut at eps all pairs of a cluster are within eps of each other (squared Euclidean distance).
    """

    num_points: int
    merges: NDArray[np.int64]
    """[M, 2], clusters named by their smallest members, lowest first."""
    heights: NDArray[np.float64]
    """[M], never falling."""

    def num_clusters(self, eps: float) -> int:
        return self.num_points - int(np.searchsorted(self.heights, eps, side="right"))

    def eps_for(self, budget: int) -> float:
        """The largest height whose cut has at least `budget` clusters; 0.0 where the lowest merge is one too many.

        Raises:
            ValueError: budget is not in [1, number of points].
        """
        if not 1 <= budget <= self.num_points:
            raise ValueError(f"selection: budget must lie in [1, {self.num_points}], the corpus, got {budget}")
        for height in self.heights[: self.num_points - budget][::-1].tolist():
            if self.num_clusters(height) >= budget:
                return height
        return 0.0

    def cut(self, eps: float) -> NDArray[np.int64]:
        """Labels 0 ... K - 1 of the points."""
        parent = list(range(self.num_points))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        for a, b in self.merges[: np.searchsorted(self.heights, eps, side="right")].tolist():
            parent[root(b)] = root(a)
        roots = np.array([root(i) for i in range(self.num_points)], np.int64)
        return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def diameter_clusters(
    points_ND: torch.Tensor, *, neighbors: int = 16, max_diameter: float = float("inf"), impl: str = "auto"
) -> Dendrogram:
    """Reciprocal agglomerative clustering with complete linkage on the graph of nearest neighbors.

    Only clusters that the graph joins are merged; all their pairs count for the height.

    Args:
        points_ND: float32 [N, D], finite.
        neighbors: edges of each point, in [1, 63].
        max_diameter: no merge above this squared distance; it bounds time and memory.
        impl: of `kmeans_assign`, which finds the neighbors.

    Memory: O(N neighbors). Time of a merge: the pairs that the graph lacks. Meant for N up to 1e5.
    Source: Sumengen et al. 2021 (reciprocal agglomerative clustering), as arXiv 2502.02494 uses it.
    """
    num = len(points_ND)
    if not 1 <= neighbors < 64:
        raise ValueError(f"diameter_clusters: neighbors must lie in [1, 63], got {neighbors}")
    # A point is its own nearest, or one of several equal to it is.
    found = kmeans_assign(points_ND, points_ND, m=min(neighbors + 1, num), impl=impl).labels.cpu().numpy()
    first, second, heights = complete_linkage(points_ND.cpu().numpy(), found, float(max_diameter))
    order = np.argsort(heights, kind="stable")
    return Dendrogram(num, np.stack([first, second], 1)[order], heights[order])


def medoids(points: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The example closest to the mean of each cluster 0 ... K - 1; the first of several."""
    num = int(labels.max()) + 1
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(num))
    means = np.add.reduceat(points[order].astype(np.float64), starts) / np.bincount(labels)[:, None]
    distance = ((points - means[labels]) ** 2).sum(1)
    return np.lexsort((np.arange(len(labels)), distance, labels))[starts]
