"""Fused linear + distillation loss."""

from effkern.ops.distill.api import linear_distill_loss
from effkern.ops.distill.types import DistillResult, DistillStats, TeacherHidden, TeacherLogits

__all__ = ["DistillResult", "DistillStats", "TeacherHidden", "TeacherLogits", "linear_distill_loss"]
