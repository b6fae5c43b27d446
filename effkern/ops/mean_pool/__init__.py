"""Means of ragged groups of rows: of an embedding table's, and of normalised hidden states."""

from effkern.ops.mean_pool.api import mean_pool, norm_mean_pool
from effkern.ops.mean_pool.fold import fold_projection

__all__ = ["fold_projection", "mean_pool", "norm_mean_pool"]
