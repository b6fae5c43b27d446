"""Operators: `soft_labels` runs the chunk driver, `soft_label_rows` is the row pass that effkern._C implements."""

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.soft_labels import driver
from effkern.ops.soft_labels.rows import METHODS, RowOptions, num_slots

_library = torch.library.Library("effkern", "FRAGMENT")

_library.define(
    "soft_labels(Tensor hidden, Tensor? weight, Tensor? bias, Tensor positions, str method, int k, int draws, "
    "float temperature, int seed, float? softcap, float logit_scale, SymInt vocab_valid, str impl, int? chunk_bytes) "
    "-> (Tensor ids, Tensor logprobs, Tensor tail, Tensor lse)"
)
_library.define(
    "soft_label_rows(Tensor logits, Tensor positions, int method, int k, int draws, float temperature, int seed) "
    "-> (Tensor ids, Tensor logprobs, Tensor tail, Tensor lse)"
)


def _run(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    positions: Tensor,
    method: str,
    k: int,
    draws: int,
    temperature: float,
    seed: int,
    softcap: float | None,
    logit_scale: float,
    vocab_valid: int,
    impl: str,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = RowOptions(method, k, draws, temperature, seed)
    # The products have their types already; autocast would round the float32 tiles.
    with torch.autocast(hidden.device.type, enabled=False):
        return driver.run(
            hidden, weight, bias, positions, options, softcap, logit_scale, vocab_valid, impl, chunk_bytes
        )


_library.impl("soft_labels", _run, "CompositeExplicitAutograd")


def _outputs(like: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = like.shape[0], torch.promote_types(like.dtype, torch.float32)
    ids = like.new_empty((rows, slots), dtype=torch.int32)
    return ids, torch.empty_like(ids, dtype=dtype), like.new_empty(rows, dtype=dtype), like.new_empty(rows, dtype=dtype)


@torch.library.register_fake("effkern::soft_labels", lib=_library)
def _fake(hidden, weight, bias, positions, method, k, draws, temperature, seed, *rest):
    return _outputs(hidden, num_slots(RowOptions(method, k, draws, temperature, seed), rest[-3]))


@torch.library.register_fake("effkern::soft_label_rows", lib=_library)
def _fake_rows(logits, positions, method, k, draws, temperature, seed):
    return _outputs(logits, num_slots(RowOptions(METHODS[method], k, draws, temperature, seed), logits.shape[1]))


registry.register("soft_labels", registry.cpp(), registry.reference())
