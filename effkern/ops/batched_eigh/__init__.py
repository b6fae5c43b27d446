"""Eigen-decomposition of many small symmetric matrices."""

from effkern.ops.batched_eigh.api import BatchedEigh, batched_eigh

__all__ = ["BatchedEigh", "batched_eigh"]
