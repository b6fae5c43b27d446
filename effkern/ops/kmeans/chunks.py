"""The chunk driver of the C++ implementation: one tile of products, merged into the m best at once.

N points, R of a chunk, K centroids, C of a tile, D columns, M candidates
"""

import torch
from torch import Tensor

from effkern.ops.distill import gemm
from effkern.ops.kmeans.reference import distances

# A tile of products stays in the second-level cache, from the product to the merge.
TILE_BYTES = 1 << 21
TILE_CENTROIDS = 2048


def assign(points_ND: Tensor, centroids_KD: Tensor, m: int, budget: int | None) -> tuple[Tensor, Tensor]:
    """(labels, squared distances), each [N, M]."""
    num_points, num_centroids = len(points_ND), len(centroids_KD)
    labels_NM = torch.full((num_points, m), -1, dtype=torch.int64)
    distance_NM = torch.empty((num_points, m), dtype=torch.float32)
    half_K = (centroids_KD.double().square().sum(1) / 2).float()
    columns = min(TILE_CENTROIDS, num_centroids)
    rows = max(1, min(num_points, (TILE_BYTES if budget is None else budget) // (4 * columns)))
    buffer_RC: Tensor | None = None
    for n in range(0, num_points, rows):
        points_RD, labels_RM = points_ND[n : n + rows], labels_NM[n : n + rows]
        best_RM = torch.full((len(points_RD), m), -torch.inf)
        for k in range(0, num_centroids, columns):
            tile_CD = centroids_KD[k : k + columns]
            # A narrower last tile would be a strided part of the buffer.
            full = len(tile_CD) == columns and gemm.writes_into_buffer(points_RD)
            products_RC = gemm.logits(points_RD, tile_CD, buffer_RC if full else None)
            if full and buffer_RC is None:
                buffer_RC = products_RC
            torch.ops.effkern.kmeans_merge(products_RC, half_K[k : k + columns], k, best_RM, labels_RM)
        distance_NM[n : n + rows] = distances(points_RD, best_RM)
    return labels_NM, distance_NM
