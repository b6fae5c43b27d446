"""effkern::kmeans_assign, the one op of its public function, and effkern::kmeans_merge, which csrc/cpu/kmeans.cpp
implements: the m best of each row so far, with one tile of products more."""

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.kmeans import chunks

_library = torch.library.Library("effkern", "FRAGMENT")
_library.define(
    "kmeans_assign(Tensor points, Tensor centroids, int m, str impl, int? chunk_bytes) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# products [R, C], half_norms [C] of the centroids first, first + 1 ...; best [R, m] falling, labels [R, m].
_library.define(
    "kmeans_merge(Tensor products, Tensor half_norms, int first, Tensor(a!) best, Tensor(b!) labels) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("effkern::kmeans_assign", "CompositeExplicitAutograd", lib=_library)
def _assign(points: Tensor, centroids: Tensor, m: int, impl: str, chunk_bytes: int | None) -> tuple[Tensor, Tensor]:
    # The products have their types already; autocast would round them.
    with torch.autocast(points.device.type, enabled=False):
        if impl == "triton":
            from effkern.ops.kmeans import triton

            return triton.assign(points, centroids, m)
        return chunks.assign(points, centroids, m, chunk_bytes)


@torch.library.register_fake("effkern::kmeans_assign", lib=_library)
def _(points: Tensor, centroids: Tensor, m: int, impl: str, chunk_bytes: int | None) -> tuple[Tensor, Tensor]:
    labels = points.new_empty((points.shape[0], m), dtype=torch.int64)
    return labels, points.new_empty(labels.shape, dtype=torch.float32)


@torch.library.register_fake("effkern::kmeans_merge", lib=_library)
def _(products: Tensor, half_norms: Tensor, first: int, best: Tensor, labels: Tensor) -> None:
    return None


registry.register("kmeans", registry.cpp(), registry.triton(), registry.reference())
