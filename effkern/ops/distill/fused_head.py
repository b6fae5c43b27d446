"""Statistics of the output layer without its logits: the logit tile never leaves the multiprocessor.

    N rows, V vocabulary, D hidden size, S splits of the vocabulary, K ids of a row

One program takes a block of rows and a split of the vocabulary. It forms a tile of logits by tl.dot, folds it into a
running maximum and sum per row and counts what exceeds the label's logit, which a small kernel has gathered before.
No N x V traffic at all, but a slower product than the vendor library's: the cost model has it ahead of a product and
one read of the logits at hidden sizes up to about 400 on an H100 (docs/notes/fused-head.md). Not yet timed on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Compute capability from -> (rows, columns, depth of a tile, warps, stages). The largest tiles that compile without
# spills, with bias and softcap or without (tests/ops/test_fused_head.py).
LAUNCH = {9: (128, 128, 64, 8, 3), 0: (128, 128, 32, 8, 4)}

# Programs per multiprocessor, so that the last wave is short.
WAVES = 4


@triton.jit
def _finish(raw, bias, logit_scale, softcap, HAS_CAP: tl.constexpr):
    """z = c tanh(k (raw + bias) / c)."""
    z = (raw + bias) * logit_scale
    if HAS_CAP:
        # tanh(x) = 2 sigmoid(2x) - 1
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def gathered_logits_kernel(
    hidden_ptr, weight_ptr, bias_ptr, ids_ptr, out_ptr, vocab, dim, num_ids, hidden_stride, weight_stride,
    logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of K ids per row; NaN for an id outside of the vocabulary."""
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * num_ids + k
    token = tl.load(ids_ptr + at).to(tl.int64)
    inside = (token >= 0) & (token < vocab)
    depth = tl.arange(0, BLOCK_D)
    hidden_ptr += row * hidden_stride
    weight_ptr += tl.where(inside, token, 0) * weight_stride
    total = tl.zeros([BLOCK_D], tl.float32)
    for d in range(0, dim, BLOCK_D):
        mask = d + depth < dim
        h = tl.load(hidden_ptr + d + depth, mask=mask, other=0.0).to(tl.float32)
        total += h * tl.load(weight_ptr + d + depth, mask=mask, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + tl.where(inside, token, 0)).to(tl.float32)
    z = _finish(tl.sum(total, 0), bias, logit_scale, softcap, HAS_CAP)
    tl.store(out_ptr + at, tl.where(inside, z, float("nan")))


@triton.jit
def head_stats_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, gathered_ptr, max_ptr, sum_ptr, own_ptr, above_ptr,
    num_rows, vocab, dim, hidden_stride, weight_stride, tiles_per_split, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of each row in one split: maximum, sum of exp(z - maximum), the label's logit (0 if it lies in another split),
    and how many z exceed the gathered logit of the label."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    in_rows = rows < num_rows
    label = tl.load(labels_ptr + rows, mask=in_rows, other=-1).to(tl.int32)
    gathered = tl.load(gathered_ptr + rows, mask=in_rows, other=0.0)
    depth = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride + depth[None, :]

    # The running maximum stays above -inf, so that a tile of -inf adds exp(-inf) = 0 and not exp(nan).
    m = tl.full([BLOCK_N], -3.0e38, tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    own = tl.zeros([BLOCK_N], tl.float32)
    above = tl.zeros([BLOCK_N], tl.int32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(vocab, BLOCK_V))
    for tile in range(first, last):
        cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        in_cols = cols < vocab
        weight_ptrs = weight_ptr + cols.to(tl.int64)[:, None] * weight_stride + depth[None, :]
        raw = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for d in range(0, dim, BLOCK_D):
            in_dim = d + depth < dim
            h = tl.load(hidden_ptrs + d, mask=in_rows[:, None] & in_dim[None, :], other=0.0)
            w = tl.load(weight_ptrs + d, mask=in_cols[:, None] & in_dim[None, :], other=0.0)
            raw = tl.dot(h, w.T, raw, input_precision="ieee")
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
        z = tl.where(in_cols[None, :], _finish(raw, bias, logit_scale, softcap, HAS_CAP), float("-inf"))
        new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        m = new
        is_label = cols[None, :] == label[:, None]
        own += tl.sum(tl.where(is_label, z, 0.0), 1)
        # Its sum is rounded otherwise than the gathered one, and must not exceed it.
        above += tl.sum(((z > gathered[:, None]) & ~is_label).to(tl.int32), 1)
    out = split.to(tl.int64) * num_rows + rows
    tl.store(max_ptr + out, m, mask=in_rows)
    tl.store(sum_ptr + out, s, mask=in_rows)
    tl.store(own_ptr + out, own, mask=in_rows)
    tl.store(above_ptr + out, above, mask=in_rows)


def gathered_logits(
    hidden_ND: Tensor, weight_VD: Tensor, ids_NK: Tensor, bias_V: Tensor | None, logit_scale: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Finished logits [N, K] in float32, of `ids` alone: a label, or the kept entries of a sparse teacher."""
    num_rows, num_ids = ids_NK.shape
    dim, vocab = hidden_ND.shape[1], weight_VD.shape[0]
    out_NK = torch.empty(num_rows, num_ids, dtype=torch.float32, device=hidden_ND.device)
    if out_NK.numel():
        with torch.cuda.device_of(hidden_ND):
            gathered_logits_kernel[(num_rows, num_ids)](
                hidden_ND, weight_VD, hidden_ND if bias_V is None else bias_V, ids_NK.contiguous(), out_NK,
                vocab, dim, num_ids, hidden_ND.stride(0), weight_VD.stride(0), logit_scale, softcap or 1.0,
                HAS_BIAS=bias_V is not None, HAS_CAP=softcap is not None,
                BLOCK_D=min(1024, triton.next_power_of_2(dim)),
            )  # fmt: skip
    return out_NK


def label_stats(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, logit_scale: float,
    softcap: float | None, ignore_index: int, launch: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, lse, label_logit) as [3, N] float32, and rank [N]: what token_stats defines.

    Rows of `hidden` and `weight` are contiguous. A logit of +inf makes its row NaN. `launch` is a line of LAUNCH.
    """
    num_rows, dim = hidden_ND.shape
    vocab = weight_VD.shape[0]
    device = hidden_ND.device
    gathered_N1 = gathered_logits(hidden_ND, weight_VD, labels_N[:, None], bias_V, logit_scale, softcap)
    block_n, block_v, block_d, warps, stages = launch or _launch(device)
    row_tiles, tiles = triton.cdiv(num_rows, block_n), triton.cdiv(vocab, block_v)
    splits = max(1, min(tiles, WAVES * _multiprocessors(device) // max(1, row_tiles)))
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    max_SN = torch.empty(splits, num_rows, dtype=torch.float32, device=device)
    sum_SN, own_SN = torch.empty_like(max_SN), torch.empty_like(max_SN)
    above_SN = torch.empty(splits, num_rows, dtype=torch.int32, device=device)
    if num_rows:
        with torch.cuda.device_of(hidden_ND):
            head_stats_kernel[(row_tiles, splits)](
                hidden_ND, weight_VD, hidden_ND if bias_V is None else bias_V, labels_N, gathered_N1, max_SN, sum_SN,
                own_SN, above_SN, num_rows, vocab, dim, hidden_ND.stride(0), weight_VD.stride(0), per_split,
                logit_scale, softcap or 1.0,
                HAS_BIAS=bias_V is not None, HAS_CAP=softcap is not None,
                BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_D=block_d, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    m = max_SN.amax(0)
    log_sum = (sum_SN * torch.exp(max_SN - m)).sum(0).log()
    ignored = labels_N == ignore_index
    outside = (labels_N < 0) | (labels_N >= vocab)
    z_y = own_SN.sum(0).masked_fill(outside, float("nan"))
    # Not lse - z_y: around large logits the rounding of lse would stay in the loss.
    stats_SN = torch.stack([(m - z_y) + log_sum, m + log_sum, z_y])
    rank_N = above_SN.sum(0).masked_fill(ignored | outside, -1)
    return stats_SN.masked_fill(ignored, 0), rank_N


def _launch(device: torch.device) -> tuple[int, ...]:
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return next(launch for least, launch in LAUNCH.items() if major >= least)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _compile_case(launch: tuple[int, ...], **flags: bool) -> tuple[Any, ...]:
    """What `tests.native.triton_codegen.measure` compiles without a GPU: a line of LAUNCH."""
    block_n, block_v, block_d, warps, stages = launch
    pointers = {
        "hidden_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*fp32", "labels_ptr": "*i64",
        "gathered_ptr": "*fp32", "max_ptr": "*fp32", "sum_ptr": "*fp32", "own_ptr": "*fp32", "above_ptr": "*i32",
    }  # fmt: skip
    sizes = dict.fromkeys(("num_rows", "vocab", "dim", "hidden_stride", "weight_stride"), "i32:16")
    signature = {**pointers, **sizes, "tiles_per_split": "i32", "logit_scale": "fp32", "softcap": "fp32"}
    constants = {"HAS_BIAS": False, "HAS_CAP": False, **flags}
    blocks = {"BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_D": block_d}
    return head_stats_kernel, signature, {**constants, **blocks}, {"num_warps": warps, "num_stages": stages}


# By the least capability they are for.
COMPILE_CASES = {
    major: (_compile_case(launch), _compile_case(launch, HAS_BIAS=True, HAS_CAP=True))
    for major, launch in LAUNCH.items()
}
