"""op_name: the squared-ReLU gate, one pass forward and one backward."""

from typing import Any

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.op_name import reference
from effkern.ops.op_name import schema as schema

OP = "op_name"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What each compiled implementation takes; the reference takes all.
_COVERED = {"cpp": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}


def op_name(gate_ND: Tensor, up_ND: Tensor, *, impl: str = "auto") -> Tensor:
    """Squared-ReLU gate.

    y = relu(g)^2 u,   dL/dg = 2 relu(g) u dL/dy,   dL/du = relu(g)^2 dL/dy

    Computed in float32 (float64 for float64) and rounded once, whatever the inputs are. NaN stays NaN; dL/dg is 0
    where g <= 0, whatever u holds.

    Args:
        gate_ND: g, [N, D], float32, bfloat16, float16 or float64, stride 1 along D, any stride between rows.
        up_ND: u, of the same shape, dtype and device, with a stride of its own. Both get gradients.
        impl: "auto", "cpp" (CPU: float32, bfloat16), "triton" (CUDA: also float16) or "reference".

    Returns:
        y, [N, D], contiguous, dtype of the inputs.

    Raises:
        ValueError: a shape, layout or device is wrong.
        TypeError: no tensor, or its dtype.
        NotImplementedError: impl does not cover a device or dtype; a second derivative ("reference" has one).

    Memory: the result; backward two gradients. Both inputs are kept for it. Deterministic.
    Source: So et al., arXiv 2109.08668 (squared ReLU); the gate and its derivative: own.
    """
    _check("gate", gate_ND)
    _check("up", up_ND)
    if up_ND.dtype != gate_ND.dtype:
        raise TypeError(f"{OP}: up must have the dtype of gate, {gate_ND.dtype}, got {up_ND.dtype}")
    if up_ND.shape != gate_ND.shape:
        raise ValueError(f"{OP}: up must have the shape of gate, {list(gate_ND.shape)}, got {list(up_ND.shape)}")
    if up_ND.device != gate_ND.device:
        raise ValueError(f"{OP}: up must be on {gate_ND.device}, got {up_ND.device}")
    chosen = _choose(impl, gate_ND)
    if chosen == "reference":
        return reference.op_name(gate_ND, up_ND)
    return _Gate.apply(chosen, gate_ND, up_ND)


def _check(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{OP}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{OP}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{OP}: {name} must be [N, D], got shape {list(x.shape)}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"{OP}: {name} must have stride 1 along D, got {x.stride(1)}")


def _choose(impl: str, x: Tensor) -> str:
    name = registry.choose(OP, impl, x.device)
    if impl == "auto" and name == "triton" and x.device.type == "cpu":
        return "reference"
    if name in _COVERED and x.dtype not in _COVERED[name]:
        if impl != "auto":
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _COVERED[name])
            raise NotImplementedError(f"{OP}: impl={impl!r} takes {kinds}, got {x.dtype}")
        return "reference"
    return name


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, impl: str, gate_ND: Tensor, up_ND: Tensor) -> Tensor:
        ctx.impl = impl
        ctx.save_for_backward(gate_ND, up_ND)
        ops = torch.ops.effkern
        return (ops.op_name_fwd if impl == "cpp" else ops.op_name_triton_fwd)(gate_ND, up_ND)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(f"{OP}: create_graph=True is covered by impl='reference' alone")
        gate_ND, up_ND = ctx.saved_tensors
        ops = torch.ops.effkern
        operator = ops.op_name_bwd if ctx.impl == "cpp" else ops.op_name_triton_bwd
        grad_gate, grad_up = operator(gate_ND, up_ND, grad_outputs[0].contiguous())
        return None, grad_gate, grad_up
