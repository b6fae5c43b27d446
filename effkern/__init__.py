"""effkern: methods that make large-model training cheaper, as fast torch ops with plain-PyTorch oracles."""

from importlib import import_module
from typing import Any

from effkern.ops.batched_eigh import BatchedEigh, batched_eigh
from effkern.ops.distill import (
    DistillResult,
    DistillStats,
    TeacherConfidence,
    TeacherHidden,
    TeacherLogits,
    TeacherLogProbs,
    TeacherSimilarity,
    TeacherTopK,
    linear_distill_loss,
)
from effkern.ops.kmeans import Assignment, KMeans, kmeans, kmeans_assign, kmeans_update
from effkern.ops.laurel import LaurelOutput, laurel_residual
from effkern.ops.loop_similarity import LoopSimilarity, loop_similarity
from effkern.ops.loop_step import LoopStepOutput, loop_step
from effkern.ops.looped_linear_attention import LoopedAttentionOutput, looped_linear_attention
from effkern.ops.mean_pool import fold_projection, mean_pool, norm_mean_pool
from effkern.ops.shampoo import matrix_inverse_root
from effkern.ops.soft_labels import SoftLabels, soft_labels
from effkern.ops.token_stats import LabelStats, token_stats

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "BatchedEigh",
    "DistillResult",
    "DistillStats",
    "KMeans",
    "LabelStats",
    "LaurelOutput",
    "LoopSimilarity",
    "LoopStepOutput",
    "LoopedAttentionOutput",
    "SoftLabels",
    "TeacherConfidence",
    "TeacherHidden",
    "TeacherLogProbs",
    "TeacherLogits",
    "TeacherSimilarity",
    "TeacherTopK",
    "__version__",
    "batched_eigh",
    "distributed",
    "fold_projection",
    "kmeans",
    "kmeans_assign",
    "kmeans_update",
    "laurel_residual",
    "linear_distill_loss",
    "loop_similarity",
    "loop_step",
    "looped_linear_attention",
    "matrix_inverse_root",
    "mean_pool",
    "nn",
    "norm_mean_pool",
    "optim",
    "soft_labels",
    "token_stats",
]


def __getattr__(name: str) -> Any:
    if name in ("nn", "optim", "models", "data", "train", "integrations", "distributed"):
        try:
            return import_module(f"effkern.{name}")
        except ModuleNotFoundError as error:
            from effkern.extras import advice

            if (said := advice(error)) is None:
                raise
            raise ModuleNotFoundError(f"effkern.{name}: {said}", name=error.name) from error
    raise AttributeError(f"module 'effkern' has no attribute {name!r}")
