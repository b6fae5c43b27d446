"""effkern::label_rank: the operator that csrc/cpu/label_rank.cpp and csrc/cuda/label_rank.cu implement."""

import torch
from torch import Tensor

from effkern.ops import registry

torch.library.define(
    "effkern::label_rank",
    "(Tensor logits, Tensor labels, int ignore_index, int vocab_valid) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("effkern::label_rank")
def _(logits: Tensor, labels: Tensor, ignore_index: int, vocab_valid: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = logits.new_empty(labels.shape, dtype=torch.float32)
    return loss, torch.empty_like(loss), torch.empty_like(loss), labels.new_empty(labels.shape)


registry.register("label_rank", registry.cuda(), registry.cpp(), registry.reference())
