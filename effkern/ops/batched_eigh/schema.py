"""effkern::batched_eigh, by effkern._C and effkern._C_cuda."""

import torch
from torch import Tensor

from effkern import native
from effkern.ops import registry

_library = torch.library.Library("effkern", "FRAGMENT")
# matrices: contiguous [B, n, n]; method: an index into api.METHODS.
_library.define("batched_eigh(Tensor matrices, int method) -> (Tensor values, Tensor vectors, Tensor status)")


@torch.library.register_fake("effkern::batched_eigh", lib=_library)
def _fake(matrices: Tensor, method: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        matrices.new_empty(matrices.shape[:2]),
        torch.empty_like(matrices),
        matrices.new_empty(matrices.shape[:1], dtype=torch.int32),
    )


native.load_on_first_call(_library, "batched_eigh")
registry.register("batched_eigh", registry.cpp(), registry.cuda(), registry.reference())
