"""How alike the layers of adjacent blocks are: the looping regulariser."""

from effkern.ops.loop_similarity.api import LoopSimilarity, loop_similarity

__all__ = ["LoopSimilarity", "loop_similarity"]
