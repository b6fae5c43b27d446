"""Operators of the squared-ReLU gate: by effkern._C, and the same two by Triton."""

import torch
from torch import Tensor

from effkern.ops import registry

_library = torch.library.Library("effkern", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)

# Rows of stride 1 along D; `grad` and the results are contiguous.
_SCHEMAS = {
    "fwd": "(Tensor gate, Tensor up) -> Tensor",
    "bwd": "(Tensor gate, Tensor up, Tensor grad) -> (Tensor grad_gate, Tensor grad_up)",
}


def _fake_fwd(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_bwd(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _triton_fwd(*arguments: Tensor) -> Tensor:
    from effkern.ops.op_name import triton

    return triton.forward(*arguments)


def _triton_bwd(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    from effkern.ops.op_name import triton

    return triton.backward(*arguments)


for _name, _fake, _triton in (("fwd", _fake_fwd, _triton_fwd), ("bwd", _fake_bwd, _triton_bwd)):
    _library.define(f"op_name_{_name}{_SCHEMAS[_name]}", tags=_TAGS)
    _library.define(f"op_name_triton_{_name}{_SCHEMAS[_name]}", tags=_TAGS)
    _library.impl(f"op_name_triton_{_name}", _triton, "CompositeExplicitAutograd")
    for _op in (f"effkern::op_name_{_name}", f"effkern::op_name_triton_{_name}"):
        torch.library.register_fake(_op, _fake, lib=_library)


registry.register("op_name", registry.cpp(), registry.triton(), registry.reference())
