"""The core of LoRA-RITE: a step of all pairs of one rank, and its stages."""

from effkern.ops.lora_rite.api import lora_rite_rebuild_, lora_rite_step_
from effkern.ops.lora_rite.group import RiteGroup, new_group
from effkern.ops.lora_rite.reference import RiteOptions
from effkern.ops.lora_rite.stages import Products, Update, gram, precondition_, rebase_, traces, update_

__all__ = [
    "Products",
    "RiteGroup",
    "RiteOptions",
    "Update",
    "gram",
    "lora_rite_rebuild_",
    "lora_rite_step_",
    "new_group",
    "precondition_",
    "rebase_",
    "traces",
    "update_",
]
