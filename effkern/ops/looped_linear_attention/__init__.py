"""In-context linear regression by looped linear attention."""

from effkern.ops.looped_linear_attention.api import LoopedAttentionOutput, looped_linear_attention

__all__ = ["LoopedAttentionOutput", "looped_linear_attention"]
