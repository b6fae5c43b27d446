"""effkern::label_rank, which csrc/cpu/label_rank.cpp and csrc/cuda/label_rank.cu implement, and effkern::token_stats.

`token_stats` is the one op of its public function; its driver runs the kernels of label_rank chunk by chunk.
"""

import torch
from torch import Tensor

from effkern import native
from effkern.ops import registry
from effkern.ops.token_stats import chunks

torch.library.define(
    "effkern::label_rank",
    "(Tensor logits, Tensor labels, int ignore_index, int vocab_valid) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("effkern::label_rank")
def _(logits: Tensor, labels: Tensor, ignore_index: int, vocab_valid: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = logits.new_empty(labels.shape, dtype=torch.float32)
    return loss, torch.empty_like(loss), torch.empty_like(loss), labels.new_empty(labels.shape)


_library = torch.library.Library("effkern", "FRAGMENT")
native.load_on_first_call(_library, "label_rank")
registry.register("label_rank", registry.cuda(), registry.cpp(), registry.reference())

torch.library.define(
    "effkern::token_stats",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float logit_scale, float? softcap, int ignore_index, "
    "SymInt vocab_valid, ScalarType compute_dtype, str impl, int? chunk_bytes) -> (Tensor stats, Tensor rank)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("effkern::token_stats", "CompositeExplicitAutograd")
def _token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    vocab_valid: int,
    compute_dtype: torch.dtype,
    impl: str,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    if labels.device.type == "cpu":
        outside = ((labels < 0) | (labels >= vocab_valid)) & (labels != ignore_index)
        if outside.any():
            bad = labels[outside][0].item()
            raise ValueError(f"token_stats: labels must be {ignore_index} or lie in [0, {vocab_valid}), got {bad}")
    bias = None if bias is None else bias[:vocab_valid]
    hidden, weight = hidden.to(compute_dtype), weight[:vocab_valid].to(compute_dtype)
    # The product has its types already; autocast would round the float32 tiles.
    with torch.autocast(hidden.device.type, enabled=False):
        if impl == "triton":
            from effkern.ops.distill.fused_head import label_stats

            return label_stats(hidden, weight, bias, labels.contiguous(), logit_scale, softcap, ignore_index)
        return chunks.run(hidden, weight, bias, labels, logit_scale, softcap, ignore_index, impl, chunk_bytes)


@torch.library.register_fake("effkern::token_stats")
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(rest[4], torch.float32)
    return hidden.new_empty((3, labels.shape[0]), dtype=acc), labels.new_empty(labels.shape, dtype=torch.int64)


# Triton comes after the one that runs anywhere, so that "auto" never takes it: no GPU has timed it yet.
registry.register("token_stats", registry.cuda(), registry.cpp(), registry.reference(), registry.triton())
