"""Operators of the CPU products with bfloat16 operands and float32 results, which no library offers.

C rows of a chunk, V vocabulary, D hidden size
"""

from functools import cache

import torch
from torch import Tensor

from effkern import native

_library = torch.library.Library("effkern", "FRAGMENT")
_library.define("bf16_gemm() -> bool")
# out = a b^T, [C, V] = [C, D] [V, D]^T
_library.define("bf16_mm_nt_(Tensor(a!) out, Tensor a, Tensor b) -> ()")
# total = g^T h if `first`, else total += g^T h; [V, D] = [C, V]^T [C, D]
_library.define("bf16_add_tn_(Tensor(a!) total, Tensor g, Tensor h, bool first) -> ()")


@torch.library.register_fake("effkern::bf16_mm_nt_", lib=_library)
def _fake_mm_nt(out: Tensor, a: Tensor, b: Tensor) -> None:
    return None


@torch.library.register_fake("effkern::bf16_add_tn_", lib=_library)
def _fake_add_tn(total: Tensor, g: Tensor, h: Tensor, first: bool) -> None:
    return None


@cache
def bf16_gemm() -> bool:
    """Whether these operators run here: effkern._C is built and this CPU multiplies bfloat16 (AVX512-BF16)."""
    return native.load("_C") is None and torch.ops.effkern.bf16_gemm()
