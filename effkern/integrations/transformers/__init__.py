"""LAuReL in Hugging Face transformers: `apply_laurel` for decoders without it, `use_fused_laurel` for Gemma 3n.

transformers itself is imported by whoever made the model, never here.
"""

from effkern.integrations.transformers.apply import apply_laurel, remove_laurel
from effkern.integrations.transformers.gemma3n import remove_fused_laurel, use_fused_laurel

__all__ = ["apply_laurel", "remove_fused_laurel", "remove_laurel", "use_fused_laurel"]
