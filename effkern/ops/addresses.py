"""Tables on a device for kernels that take many tensors in one launch: addresses, and what else is said of each."""

from collections.abc import Sequence

import torch
from torch import Tensor

_TABLES: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
# Tables of gradients that moved are of no more use.
_MOST = 64


def table(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`numbers` as int64 on `device`.

    Kept, so that a step with the same addresses copies nothing, and a CUDA graph holds what the step before it used.
    """
    key = (device, tuple(numbers))
    if key not in _TABLES:
        while len(_TABLES) >= _MOST:
            del _TABLES[next(iter(_TABLES))]
        _TABLES[key] = torch.tensor(key[1], dtype=torch.int64).to(device, non_blocking=True)
    return _TABLES[key]
