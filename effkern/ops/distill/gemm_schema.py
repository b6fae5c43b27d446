"""Operators of the CPU products with bfloat16 operands and float32 results, which no library offers.

C rows of a chunk, V vocabulary, D hidden size
"""

from functools import cache

import torch
from torch import Tensor

from effkern import native

# In the order of the numbers in csrc/cpu/gemm_bf16.cpp, the fastest first.
KERNELS = ("amx", "avx512_bf16", "none")

_library = torch.library.Library("effkern", "FRAGMENT")
_library.define("bf16_gemm_kernel() -> int")
_library.define("bf16_gemm_choose(int kernel) -> ()")
# out = a b^T, [C, V] = [C, D] [V, D]^T
_library.define("bf16_mm_nt_(Tensor(a!) out, Tensor a, Tensor b) -> ()")
# The same from float32.
_library.define("f32_mm_nt_(Tensor(a!) out, Tensor a, Tensor b) -> ()")
# total = g^T h if `first`, else total += g^T h; [V, D] = [C, V]^T [C, D]
_library.define("bf16_add_tn_(Tensor(a!) total, Tensor g, Tensor h, bool first) -> ()")


@torch.library.register_fake("effkern::bf16_mm_nt_", lib=_library)
@torch.library.register_fake("effkern::f32_mm_nt_", lib=_library)
def _fake_mm_nt(out: Tensor, a: Tensor, b: Tensor) -> None:
    return None


@torch.library.register_fake("effkern::bf16_add_tn_", lib=_library)
def _fake_add_tn(total: Tensor, g: Tensor, h: Tensor, first: bool) -> None:
    return None


@cache
def bf16_gemm() -> bool:
    """Whether these operators run here: effkern._C is built and this CPU multiplies bfloat16 (AVX512-BF16)."""
    return kernel() != "none"


def kernel() -> str:
    """The kernel behind both operators, of KERNELS: the fastest that runs here, unless another was chosen."""
    return "none" if native.load("_C") else KERNELS[torch.ops.effkern.bf16_gemm_kernel()]


def choose(kernel: str) -> None:
    """Let another kernel compute the products of this process, to test or to time it; RuntimeError if it cannot."""
    torch.ops.effkern.bf16_gemm_choose(KERNELS.index(kernel))
