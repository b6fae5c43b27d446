"""Operators of both means: by effkern._C, and the same two by Triton."""

import torch
from torch import Tensor

from effkern import native
from effkern.ops import registry

_library = torch.library.Library("effkern", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)

# `offsets` int64 [N + 1]: group n has the rows offsets[n] to offsets[n + 1]. `pad`, `eod`: -1 is none.
_SCHEMAS = {
    "mean_pool": "(Tensor table, Tensor ids, Tensor offsets, int pad, int eod, bool normalize) -> Tensor",
    "norm_mean_pool": (
        "(Tensor hidden, Tensor offsets, Tensor? keep, Tensor? weight, float eps, bool normalize) -> Tensor"
    ),
}


def _fake_mean_pool(table: Tensor, ids: Tensor, offsets: Tensor, *_) -> Tensor:
    return table.new_empty((offsets.shape[0] - 1, table.shape[1]), dtype=torch.float32)


def _fake_norm_mean_pool(hidden: Tensor, offsets: Tensor, *_) -> Tensor:
    return hidden.new_empty((offsets.shape[0] - 1, hidden.shape[1]), dtype=torch.float32)


def _triton_mean_pool(*arguments) -> Tensor:
    from effkern.ops.mean_pool import triton

    return triton.mean_pool(*arguments)


def _triton_norm_mean_pool(*arguments) -> Tensor:
    from effkern.ops.mean_pool import triton

    return triton.norm_mean_pool(*arguments)


for _name, _fake, _triton in (
    ("mean_pool", _fake_mean_pool, _triton_mean_pool),
    ("norm_mean_pool", _fake_norm_mean_pool, _triton_norm_mean_pool),
):
    _library.define(f"{_name}{_SCHEMAS[_name]}", tags=_TAGS)
    _library.define(f"{_name}_triton{_SCHEMAS[_name]}", tags=_TAGS)
    _library.impl(f"{_name}_triton", _triton, "CompositeExplicitAutograd")
    for _op in (f"effkern::{_name}", f"effkern::{_name}_triton"):
        torch.library.register_fake(_op, _fake, lib=_library)


native.load_on_first_call(_library, *_SCHEMAS)
registry.register("mean_pool", registry.cpp(), registry.triton(), registry.reference())
