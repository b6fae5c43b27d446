"""The matrix products around the row pass, as the vendor library does them best.

    C rows of a chunk, V vocabulary, D hidden size

Logits are always accumulated and stored in float32 (float64 for float64 inputs). CUDA libraries write float32
from half-precision inputs. CPU libraries do not: there bfloat16 has kernels of our own where the CPU multiplies it, and
otherwise the operands are widened one vocabulary tile at a time. Where those kernels run, float32 logits come from one
of them too: the library that is fast at a few hundred rows allocates what it returns, and a chunk of logits is then
page after page of fresh memory.
"""

from functools import cache

import torch
from torch import Tensor

from effkern.ops.distill import gemm_schema, huge_pages

# Columns of logits per product on the CPU: a tile of the weight and of the logits stay in cache, which is worth 15%
# over one wide product at 256 rows (python -m benchmarks.ops.distill --tiles), and only a tile is ever widened.
CPU_TILE = 2000


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float32 and below, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def grad_dtype(dtype: torch.dtype, compute_dtype: torch.dtype) -> torch.dtype:
    """Type in which a parameter's gradient leaves the op: its own, but float32 where float16 could underflow."""
    return torch.float32 if compute_dtype == torch.float16 else dtype


def uses_onednn(x: Tensor) -> bool:
    """Whether float32 products on this CPU go to oneDNN's inner product, which torch.mm does not reach.

    At 256 rows it is 1.3 times as fast as torch.mm (python -m benchmarks.ops.distill --tiles), makes no copy of the
    weight, and obeys torch's float32 precision setting like torch.mm. It cannot write into a given buffer.
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and _onednn_available()


def uses_bf16_kernel(out: Tensor, *operands: Tensor) -> bool:
    """Whether a product goes to effkern._C, which writes float32 in the time that torch.mm takes for bfloat16.

    A float32 product over widened tiles takes twice as long (python -m benchmarks.ops.gemm_bf16).
    """
    return (
        out.device.type == "cpu"
        and out.dtype == torch.float32
        and all(x.dtype == torch.bfloat16 for x in operands)
        and all(x.stride(1) == 1 or x.shape[1] <= 1 for x in (out, *operands))
        and gemm_schema.bf16_gemm()
    )


def uses_f32_kernel(x: Tensor) -> bool:
    """Whether float32 logits come from effkern._C: into a given buffer, and with all of float32's digits.

    At 256 rows it takes 1.08 times oneDNN's time and 0.87 of torch.mm's (python -m benchmarks.ops.distill --tiles).
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.get_float32_matmul_precision() == "highest"
        and gemm_schema.bf16_gemm()
    )


def must_widen(x: Tensor) -> bool:
    """Whether torch.mm has no fast kernel for this type here: in float16 it then takes 100 times as long."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not _onednn_supports(x.dtype)


def writes_into_buffer(x: Tensor) -> bool:
    """Whether `logits` of `x` can use a former result's memory."""
    return uses_f32_kernel(x) or not uses_onednn(x)


@cache
def _onednn_available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _onednn_supports(dtype: torch.dtype) -> bool:
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return _onednn_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in new memory."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")


def logits(hidden_CD: Tensor, weight_VD: Tensor, buffer_CV: Tensor | None) -> Tensor:
    """hidden weight^T, rounded to no less than float32; in the first rows of `buffer_CV` if that is given."""
    if not writes_into_buffer(hidden_CD):
        return _onednn_linear(hidden_CD, weight_VD)
    acc = accumulator_dtype(hidden_CD.dtype)
    if buffer_CV is None:
        buffer_CV = huge_pages.empty((hidden_CD.shape[0], weight_VD.shape[0]), acc, hidden_CD.device)
    out_CV = buffer_CV[: hidden_CD.shape[0]]
    if hidden_CD.is_cuda:
        if hidden_CD.dtype == acc:
            torch.mm(hidden_CD, weight_VD.t(), out=out_CV)
        else:
            torch.mm(hidden_CD, weight_VD.t(), out_dtype=acc, out=out_CV)
        return out_CV
    hidden_CD = hidden_CD.contiguous()
    if uses_f32_kernel(hidden_CD) and all(x.stride(1) == 1 or x.shape[1] <= 1 for x in (out_CV, weight_VD)):
        torch.ops.effkern.f32_mm_nt_(out_CV, hidden_CD, weight_VD)
        return out_CV
    if uses_bf16_kernel(out_CV, hidden_CD, weight_VD):
        torch.ops.effkern.bf16_mm_nt_(out_CV, hidden_CD, weight_VD)
        return out_CV
    hidden_CD = hidden_CD.to(acc)
    for v in range(0, out_CV.shape[1], CPU_TILE):
        tile_CV, tile_VD = out_CV[:, v : v + CPU_TILE], weight_VD[v : v + CPU_TILE].to(acc)
        if uses_onednn(tile_VD):
            # Even with the copy 1.1 to 1.3 times as fast as torch.mm into the buffer.
            tile_CV.copy_(_onednn_linear(hidden_CD, tile_VD))
        else:
            torch.mm(hidden_CD, tile_VD.t(), out=tile_CV)
    return out_CV


def hidden_grad(grad_CV: Tensor, weight_VD: Tensor, out_CD: Tensor) -> None:
    """out = grad weight, rounded once."""
    if uses_onednn(grad_CV):
        out_CD.copy_(_onednn_linear(grad_CV, weight_VD.t()))
    elif must_widen(grad_CV):
        acc = accumulator_dtype(grad_CV.dtype)
        total_CD = torch.zeros(out_CD.shape, dtype=acc)
        for v in range(0, weight_VD.shape[0], CPU_TILE):
            total_CD.addmm_(grad_CV[:, v : v + CPU_TILE].to(acc), weight_VD[v : v + CPU_TILE].to(acc))
        out_CD.copy_(total_CD)
    else:
        torch.mm(grad_CV, weight_VD, out=out_CD)


def add_weight_grad(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor, first: bool) -> None:
    """total (+)= grad^T hidden; unread if `first`. `total` is float32 (float64), or in the type of the inputs.

    Only on a CPU whose bfloat16 products are the library's is the product of one chunk rounded to bfloat16 before it is
    added to a float32 total.
    """
    acc = total_VD.dtype
    wide = accumulator_dtype(hidden_CD.dtype) if must_widen(hidden_CD) else hidden_CD.dtype
    if hidden_CD.dtype == wide == acc:
        if first:
            torch.mm(grad_CV.t(), hidden_CD, out=total_VD)
        else:
            total_VD.addmm_(grad_CV.t(), hidden_CD)
    elif hidden_CD.is_cuda:
        if first:
            torch.mm(grad_CV.t(), hidden_CD, out_dtype=acc, out=total_VD)
        else:
            torch.addmm(total_VD, grad_CV.t(), hidden_CD, out_dtype=acc, out=total_VD)
    elif uses_bf16_kernel(total_VD, grad_CV, hidden_CD):
        torch.ops.effkern.bf16_add_tn_(total_VD, grad_CV, hidden_CD, first)
    else:
        hidden_CD = hidden_CD.to(wide)
        for v in range(0, total_VD.shape[0], CPU_TILE):
            part = torch.mm(grad_CV[:, v : v + CPU_TILE].to(wide).t(), hidden_CD)
            rows = total_VD[v : v + CPU_TILE]
            rows.copy_(part) if first else rows.add_(part)


def add_bias_grad(total_V: Tensor, grad_CV: Tensor) -> None:
    """total += the sum of grad over its rows, a tile at a time: summing in another type copies its input."""
    for v in range(0, total_V.shape[0], CPU_TILE):
        total_V[v : v + CPU_TILE] += grad_CV[:, v : v + CPU_TILE].sum(0, dtype=total_V.dtype)
