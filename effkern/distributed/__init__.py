"""The losses over several processes: the global denominator, and an output layer spread over ranks."""

from effkern.distributed.count import global_count
from effkern.ops.distill.parallel.api import vocab_parallel_distill_loss

__all__ = ["global_count", "vocab_parallel_distill_loss"]
