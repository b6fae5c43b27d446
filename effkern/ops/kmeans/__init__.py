"""K-means whose N x K matrix of distances never exists."""

from effkern.ops.kmeans.api import Assignment, kmeans_assign
from effkern.ops.kmeans.lloyd import KMeans, kmeans, kmeans_update

__all__ = ["Assignment", "KMeans", "kmeans", "kmeans_assign", "kmeans_update"]
