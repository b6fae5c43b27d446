"""Fused linear + distillation loss."""

from effkern.ops.distill.api import linear_distill_loss
from effkern.ops.distill.types import (
    DistillResult,
    DistillStats,
    TeacherConfidence,
    TeacherHidden,
    TeacherLogits,
    TeacherLogProbs,
    TeacherSimilarity,
    TeacherTopK,
)

__all__ = [
    "DistillResult",
    "DistillStats",
    "TeacherConfidence",
    "TeacherHidden",
    "TeacherLogProbs",
    "TeacherLogits",
    "TeacherSimilarity",
    "TeacherTopK",
    "linear_distill_loss",
]
