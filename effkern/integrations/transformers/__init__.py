"""In Hugging Face transformers: `patch` and `unpatch` for a whole causal language model, `DistillTrainer` for its
Trainer and `teacher_hidden` for a loop of one's own; and what patch is made of: `apply_laurel` for decoders without
LAuReL, `use_fused_laurel` for Gemma 3n, `loop_layers` to run a span of layers several times.

transformers itself is imported by whoever made the model, never here.
"""

from effkern.integrations.transformers.apply import apply_laurel, remove_laurel
from effkern.integrations.transformers.gemma3n import remove_fused_laurel, use_fused_laurel
from effkern.integrations.transformers.loop import loop_layers, unloop_layers
from effkern.integrations.transformers.patch import patch, unpatch
from effkern.integrations.transformers.teacher import teacher_hidden
from effkern.integrations.transformers.trainer import DistillTrainer

__all__ = [
    "DistillTrainer",
    "apply_laurel",
    "loop_layers",
    "patch",
    "remove_fused_laurel",
    "remove_laurel",
    "teacher_hidden",
    "unloop_layers",
    "unpatch",
    "use_fused_laurel",
]
