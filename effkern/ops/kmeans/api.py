"""kmeans_assign: the nearest centroids of each point."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.kmeans import reference
from effkern.ops.kmeans import schema as schema

OP = "kmeans_assign"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_M = 64


class Assignment(NamedTuple):
    """See kmeans_assign."""

    labels: Tensor
    """int64 [N, m], nearest first."""
    distance: Tensor
    """Squared Euclidean, [N, m], float32 (float64)."""


def kmeans_assign(
    points_ND: Tensor, centroids_KD: Tensor, *, m: int = 1, impl: str = "auto", chunk_bytes: int | None = None
) -> Assignment:
    """The m nearest centroids of each point, nearest first, without the N x K matrix.

    argmin_k |x - c_k|^2 = argmax_k (x . c_k - |c_k|^2 / 2);  distance = max(0, |x|^2 - 2 score)

    Of equal scores the lower index comes first. Scores are float32 (float64): a distance is exact to about
    2^-22 |x|^2, so that points far from the origin should be centred. A score of NaN or -inf is never chosen; where
    nothing is left to choose, label -1 and distance NaN.

    Args:
        points_ND: [N, D], float32/bfloat16/float16 (float64: reference), stride 1 along D.
        centroids_KD: [K, D], same dtype and device, stride 1 along D.
        m: candidates, in [1, min(K, 64)].
        impl: "auto", "cpp", "triton" (CUDA) or "reference" (holds N x K).
        chunk_bytes: of the tile of products of "cpp"; None: 2 MiB.

    Returns:
        Assignment(labels, distance), [N, m] each. Nothing gets a gradient.

    Raises:
        ValueError: a shape, layout or device is wrong, m is out of range.
        TypeError: an unsupported dtype or type.
        NotImplementedError: impl does not cover the device or dtype.

    Memory: the results and one tile. Deterministic.
    Source: own arrangement; clusters as in arXiv 2502.02494.
    """
    _check(points_ND, centroids_KD, m, chunk_bytes)
    chosen = _choose(impl, points_ND)
    points_ND, centroids_KD = points_ND.detach(), centroids_KD.detach()
    if chosen == "reference":
        return Assignment(*reference.assign(points_ND, centroids_KD, m))
    return Assignment(*torch.ops.effkern.kmeans_assign(points_ND, centroids_KD, m, chosen, chunk_bytes))


def _choose(impl: str, points: Tensor) -> str:
    chosen = registry.choose("kmeans", impl, points.device)
    if impl == "auto" and chosen == "triton" and points.device.type == "cpu":
        return "reference"
    if chosen == "reference" or points.dtype != torch.float64:
        return chosen
    if impl == "auto":
        return "reference"
    raise NotImplementedError(f"{OP}: impl={impl!r} does not cover float64 tensors")


def _check(points: Any, centroids: Any, m: Any, chunk_bytes: Any) -> None:
    for name, x in (("points", points), ("centroids", centroids)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{OP}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{OP}: {name} must have two dimensions and a column, got shape {list(x.shape)}")
        if x.shape[1] > 1 and x.stride(1) != 1:
            raise ValueError(f"{OP}: {name} must have stride 1 along its columns, got {x.stride(1)}")
    if centroids.dtype != points.dtype:
        raise TypeError(f"{OP}: centroids must have the dtype of points, {points.dtype}, got {centroids.dtype}")
    if centroids.shape[1] != points.shape[1]:
        raise ValueError(f"{OP}: centroids must have {points.shape[1]} columns, got {centroids.shape[1]}")
    if centroids.device != points.device:
        raise ValueError(f"{OP}: centroids must be on {points.device}, got {centroids.device}")
    for name, value, most in (("m", m, min(centroids.shape[0], MAX_M)), ("chunk_bytes", chunk_bytes, 2**62)):
        if value is None and name == "chunk_bytes":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{OP}: {name} must be an int, got {type(value).__name__}")
        if not 1 <= value <= most:
            raise ValueError(f"{OP}: {name} must lie in [1, {most}], got {value}")
