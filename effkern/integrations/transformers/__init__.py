"""LAuReL in Hugging Face transformers: `apply_laurel` puts it into decoders, `remove_laurel` takes it out.

transformers itself is imported by whoever made the model, never here.
"""

from effkern.integrations.transformers.apply import apply_laurel, remove_laurel

__all__ = ["apply_laurel", "remove_laurel"]
