"""In Hugging Face transformers: `apply_laurel` for decoders without LAuReL, `use_fused_laurel` for Gemma 3n, and
`loop_layers` to run a span of layers several times.

transformers itself is imported by whoever made the model, never here.
"""

from effkern.integrations.transformers.apply import apply_laurel, remove_laurel
from effkern.integrations.transformers.gemma3n import remove_fused_laurel, use_fused_laurel
from effkern.integrations.transformers.loop import loop_layers, unloop_layers

__all__ = [
    "apply_laurel",
    "loop_layers",
    "remove_fused_laurel",
    "remove_laurel",
    "unloop_layers",
    "use_fused_laurel",
]
