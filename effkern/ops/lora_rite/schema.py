"""Operators of LoRA-RITE's stages, by effkern._C on the CPU and effkern._C_cuda on a GPU; see stages.py."""

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.lora_rite.group import OP

_library = torch.library.Library("effkern", "FRAGMENT")

# `numbers` and `flags`: those of terms.Terms, in its order. r x r tensors are float64, [F, r, r], contiguous.
_SCHEMAS = {
    "gram": "(Tensor[] tensors, bool[] wide, Tensor? whiten) -> Tensor",
    "precondition_": (
        "(Tensor grams, Tensor all_traces, Tensor rows, Tensor lr, Tensor? grad_scale, Tensor(a!) whiten, "
        "Tensor(b!) second, Tensor(c!) transport, Tensor(d!) escaped, Tensor(e!) steps, float[] numbers, bool[] flags) "
        "-> (Tensor gate, Tensor carry, Tensor take, Tensor apply, Tensor shrink)"
    ),
    "update_": (
        "(Tensor(a!)[] factors, Tensor(b!)[] moments, Tensor[] grads, bool[] wide, Tensor gate, Tensor carry, "
        "Tensor take, Tensor apply, Tensor shrink, Tensor whiten, Tensor exact) "
        "-> (Tensor grams, Tensor crosses, Tensor sizes)"
    ),
    "rebase_": (
        "(Tensor grams, Tensor crosses, Tensor sizes, Tensor? gate, Tensor(a!) whiten, Tensor(b!) transport, "
        "Tensor(c!) exact, bool single, float tolerance) -> ()"
    ),
    # CUDA alone: sums per tile of the Triton kernels, [tiles, width]; factor f's are in [first[f], first[f + 1]).
    "reduce": ("(Tensor partial, Tensor first, Tensor rows, int rank, float skip_rms) -> (Tensor sums, Tensor traces)"),
    "rebase_tiles_": (
        "(Tensor partial, Tensor first, Tensor gate, Tensor(a!) whiten, Tensor(b!) transport, Tensor(c!) exact, "
        "bool single, float tolerance) -> ()"
    ),
}


def _fake_gram(tensors, wide, whiten) -> Tensor:
    rank = tensors[0].shape[0 if wide[0] else 1]
    return tensors[0].new_empty((len(tensors), rank, rank), dtype=torch.float64)


def _fake_precondition(grams, all_traces, rows, lr, grad_scale, *state_and_terms) -> tuple[Tensor, ...]:
    matrices = (torch.empty_like(grams) for _ in range(3))
    return (all_traces.new_empty(()), *matrices, torch.empty_like(rows))


def _fake_update(factors, moments, grads, wide, gate, carry, take, apply, shrink, whiten, exact) -> tuple[Tensor, ...]:
    return torch.empty_like(whiten), torch.empty_like(whiten), torch.empty_like(shrink)


def _fake_rebase(*arguments) -> None:
    return None


def _fake_reduce(partial, first, rows, rank, skip_rms) -> tuple[Tensor, Tensor]:
    return partial.new_empty((rows.shape[0], partial.shape[1])), torch.empty_like(rows)


for _name, _fake in (
    ("gram", _fake_gram),
    ("precondition_", _fake_precondition),
    ("update_", _fake_update),
    ("rebase_", _fake_rebase),
    ("reduce", _fake_reduce),
    ("rebase_tiles_", _fake_rebase),
):
    _library.define(f"lora_rite_{_name}{_SCHEMAS[_name]}")
    torch.library.register_fake(f"effkern::lora_rite_{_name}", _fake, lib=_library)

registry.register(
    OP, registry.cpp(), registry.triton(), registry.Implementation("plain", lambda device: None)
)  # fmt: skip
