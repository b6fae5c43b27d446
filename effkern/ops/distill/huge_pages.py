"""Fresh memory for results of many megabytes.

Memory of this size goes back to the system when it is freed, so that every step touches new pages: 16000 of them, each
a fault, for the float32 weight gradient at V = 32000 and D = 512. Pages of 2 MiB need 32.
"""

import torch
from torch import Tensor

from effkern import native

_library = torch.library.Library("effkern", "FRAGMENT")
_library.define("advise_huge_pages(Tensor x) -> ()")


@torch.library.register_fake("effkern::advise_huge_pages", lib=_library)
def _fake_advise(x: Tensor) -> None:
    return None


# Huge pages that a tensor covers whole are what counts.
LEAST_BYTES = 8 << 20


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; of a large tensor on a CPU the system is asked for huge pages (Linux grants them on "madvise")."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and x.nbytes >= LEAST_BYTES and native.load("_C") is None:
        torch.ops.effkern.advise_huge_pages(x)
    return x
