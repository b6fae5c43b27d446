"""A teacher's distribution over the vocabulary, reduced to a few entries per token."""

from effkern.ops.soft_labels.api import SoftLabels, soft_labels, soft_labels_from_logits

__all__ = ["SoftLabels", "soft_labels", "soft_labels_from_logits"]
