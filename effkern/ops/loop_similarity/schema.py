"""Operators of the looping regulariser: by effkern._C, and the same two by Triton."""

import torch
from torch import Tensor

from effkern import native
from effkern.ops import registry

_library = torch.library.Library("effkern", "FRAGMENT")

# `tensors`: contiguous, those of all groups, one group after the other, `layers[g]` of each. Gradients are
# factors [tensors, 3] (float64) of the tensor one block before, of the tensor itself and of that one block after, times
# the group's. `wanted`: 1 for each tensor that gets one; for the others an empty tensor comes.
_SCHEMAS = {
    "fwd": "(Tensor[] tensors, int[] layers, int block) -> (Tensor values, Tensor factors)",
    "bwd": "(Tensor[] tensors, Tensor factors, Tensor grad_values, int[] layers, int block, int[] wanted) -> Tensor[]",
}


def _fake_fwd(tensors, layers, block):
    like = tensors[0]
    return (
        like.new_empty(len(layers), dtype=torch.float32),
        like.new_empty((len(tensors), 3), dtype=torch.float64),
    )


def _fake_bwd(tensors, factors, grad_values, layers, block, wanted) -> list[Tensor]:
    return [torch.empty_like(t) if w else t.new_empty(0) for t, w in zip(tensors, wanted)]


def _triton_fwd(*arguments):
    from effkern.ops.loop_similarity import triton

    return triton.forward(*arguments)


def _triton_bwd(*arguments):
    from effkern.ops.loop_similarity import triton

    return triton.backward(*arguments)


for _name, _fake, _triton in (("fwd", _fake_fwd, _triton_fwd), ("bwd", _fake_bwd, _triton_bwd)):
    _library.define(f"loop_similarity_{_name}{_SCHEMAS[_name]}")
    _library.define(f"loop_similarity_triton_{_name}{_SCHEMAS[_name]}")
    _library.impl(f"loop_similarity_triton_{_name}", _triton, "CompositeExplicitAutograd")
    for _op in (f"effkern::loop_similarity_{_name}", f"effkern::loop_similarity_triton_{_name}"):
        torch.library.register_fake(_op, _fake, lib=_library)


native.load_on_first_call(_library, "loop_similarity_fwd", "loop_similarity_bwd")
registry.register("loop_similarity", registry.cpp(), registry.triton(), registry.reference())
