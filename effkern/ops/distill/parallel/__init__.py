"""The distillation loss over an output layer in slices of the vocabulary, one on each rank."""

from effkern.ops.distill.parallel.api import vocab_parallel_distill_loss

__all__ = ["vocab_parallel_distill_loss"]
