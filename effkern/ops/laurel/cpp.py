"""The passes by effkern._C: float32 and bfloat16, float32 inside."""

import torch

from effkern import native

# Declares the bfloat16 products, which the passes call by name.
from effkern.ops.distill import gemm_schema as gemm_schema
from effkern.ops.laurel.passes import BackwardPass, ForwardPass, Passes

native.load("_C")


def forward(p: ForwardPass) -> None:
    torch.ops.effkern.laurel_forward_chunks_(*p)


def backward(p: BackwardPass) -> None:
    torch.ops.effkern.laurel_backward_chunks_(*p)


PASSES = Passes(forward, backward)
