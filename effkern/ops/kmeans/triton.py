"""Assignment in Triton: a program keeps the best of BLOCK_N points while all centroids go by; N x K never exists.

Top-1 keeps one score and index a point. Top-m keeps a list of M slots; the best of a tile is moved into the place of
the list's worst as long as any point of the program gains by it, which becomes rare after the first tiles. Products of
float32 are IEEE, on the plain units. No GPU has timed it yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern.ops.kmeans.reference import distances

WARPS = 4


def blocks(dtype: torch.dtype) -> dict[str, int]:
    """Points, centroids and columns of a tile. Larger ones of float32 do not fit the registers of sm_80."""
    if dtype == torch.float32:
        return {"BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_D": 32}
    return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 64}


@triton.jit
def _scores(
    points_ptr, centroids_ptr, half_ptr, points_stride, centroids_stride, num_points, num_centroids, dim, row, k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x . c - |c|^2 / 2 of a tile; -inf behind the last centroid and for NaN."""
    column = k + tl.arange(0, BLOCK_K)
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for d in range(0, dim, BLOCK_D):
        at = d + tl.arange(0, BLOCK_D)
        x = tl.load(
            points_ptr + row[:, None] * points_stride + at[None, :],
            mask=(row < num_points)[:, None] & (at < dim)[None, :], other=0.0,
        )  # fmt: skip
        c = tl.load(
            centroids_ptr + column.to(tl.int64)[None, :] * centroids_stride + at[:, None],
            mask=(column < num_centroids)[None, :] & (at < dim)[:, None], other=0.0,
        )  # fmt: skip
        products = tl.dot(x, c, products, input_precision="ieee")
    score = products - tl.load(half_ptr + column, mask=column < num_centroids, other=0.0)[None, :]
    return tl.where((column < num_centroids)[None, :] & (score == score), score, float("-inf"))


@triton.jit
def kmeans_top1_kernel(
    points_ptr, centroids_ptr, half_ptr, best_ptr, labels_ptr, points_stride, centroids_stride,
    num_points, num_centroids, dim,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    label = tl.full([BLOCK_N], -1, tl.int32)
    for k in range(0, num_centroids, BLOCK_K):
        score = _scores(
            points_ptr, centroids_ptr, half_ptr, points_stride, centroids_stride, num_points, num_centroids, dim, row,
            k, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        value, place = tl.max(score, 1, return_indices=True)
        better = value > best
        best = tl.where(better, value, best)
        label = tl.where(better, k + place, label)
    tl.store(best_ptr + row, best, mask=row < num_points)
    tl.store(labels_ptr + row, label.to(tl.int64), mask=row < num_points)


@triton.jit
def kmeans_topm_kernel(
    points_ptr, centroids_ptr, half_ptr, best_ptr, labels_ptr, points_stride, centroids_stride,
    num_points, num_centroids, dim, num_best,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The slots are in no order; those from num_best on are never filled."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.arange(0, BLOCK_M)
    used = (slot < num_best)[None, :]
    best = tl.where(used, tl.full([BLOCK_N, BLOCK_M], float("-inf"), tl.float32), float("inf"))
    # Distinct, so that one of several empty slots is the one to fill; empty slots are negative.
    label = tl.zeros([BLOCK_N, BLOCK_M], tl.int32) - 1 - slot[None, :]
    column = tl.arange(0, BLOCK_K)
    for k in range(0, num_centroids, BLOCK_K):
        score = _scores(
            points_ptr, centroids_ptr, half_ptr, points_stride, centroids_stride, num_points, num_centroids, dim, row,
            k, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        value, place = tl.max(score, 1, return_indices=True)
        worst = tl.min(best, 1)
        gains = tl.max((value > worst).to(tl.int32), 0)
        while gains > 0:
            better = value > worst
            # Of several worst the one with the highest index leaves.
            highest = tl.max(tl.where(best == worst[:, None], label, -2147483648), 1)
            leaves = better[:, None] & (label == highest[:, None]) & used
            best = tl.where(leaves, value[:, None], best)
            label = tl.where(leaves, (k + place)[:, None], label)
            score = tl.where(column[None, :] == place[:, None], float("-inf"), score)
            value, place = tl.max(score, 1, return_indices=True)
            worst = tl.min(best, 1)
            gains = tl.max((value > worst).to(tl.int32), 0)
    to = row[:, None] * num_best + slot[None, :]
    inside = (row < num_points)[:, None] & used
    tl.store(best_ptr + to, best, mask=inside)
    tl.store(labels_ptr + to, label.to(tl.int64), mask=inside)


def assign(points: Tensor, centroids: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(labels, squared distances), each [N, m], nearest first."""
    best = points.new_empty((len(points), m), dtype=torch.float32)
    labels = points.new_empty((len(points), m), dtype=torch.int64)
    if not len(points):
        return labels, best
    half = (centroids.double().square().sum(1) / 2).float()
    strides = points.stride(0), centroids.stride(0)
    sizes = len(points), len(centroids), points.shape[1]
    tile = blocks(points.dtype)
    grid = (triton.cdiv(len(points), tile["BLOCK_N"]),)
    options = {**tile, "num_warps": WARPS}
    with torch.cuda.device_of(points):
        if m == 1:
            kmeans_top1_kernel[grid](points, centroids, half, best, labels, *strides, *sizes, **options)
        else:
            slots = triton.next_power_of_2(m)
            kmeans_topm_kernel[grid](
                points, centroids, half, best, labels, *strides, *sizes, m, BLOCK_M=slots, **options
            )  # fmt: skip
    if m > 1:
        # By index first: the second sort is stable.
        labels, order = labels.sort(1)
        best, by_score = best.gather(1, order).sort(dim=1, descending=True, stable=True)
        labels = labels.gather(1, by_score)
    return torch.where(best == -torch.inf, -1, labels), distances(points, best)


def _cases(name: str, kind: str, dtype: torch.dtype) -> dict[str, tuple]:
    sizes = {"num_points": "i32", "num_centroids": "i32", "dim": "i32:16"}
    signature = {
        "points_ptr": kind, "centroids_ptr": kind, "half_ptr": "*fp32", "best_ptr": "*fp32", "labels_ptr": "*i64",
        "points_stride": "i32:16", "centroids_stride": "i32:16", **sizes,
    }  # fmt: skip
    many = {**signature, "num_best": "i32"}
    return {
        f"top1_{name}": (kmeans_top1_kernel, signature, blocks(dtype), WARPS),
        f"top16_{name}": (kmeans_topm_kernel, many, {**blocks(dtype), "BLOCK_M": 16}, WARPS),
        f"top64_{name}": (kmeans_topm_kernel, many, {**blocks(dtype), "BLOCK_M": 64}, WARPS),
    }


COMPILE_CASES = {**_cases("fp32", "*fp32", torch.float32), **_cases("bf16", "*bf16", torch.bfloat16)}
