"""What scoring needs to know about each token: loss, log-normaliser, logit and rank of its label."""

from effkern.ops.token_stats.api import LabelStats, label_rank
from effkern.ops.token_stats.head import token_stats

__all__ = ["LabelStats", "label_rank", "token_stats"]
