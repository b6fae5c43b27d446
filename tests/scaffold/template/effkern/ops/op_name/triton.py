"""The squared-ReLU gate in Triton: a program takes BLOCK channels of one row. No GPU has timed it yet."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Channels of a program.
BLOCK = 1024
WARPS = 4


@triton.jit
def op_name_fwd_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    # A comparison with NaN is false, so that it passes through.
    relu = tl.where(gate < 0.0, 0.0, gate)
    tl.store(out_ptr + row * dim + column, (relu * relu * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def op_name_bwd_kernel(
    gate_ptr, up_ptr, grad_ptr, grad_gate_ptr, grad_up_ptr, gate_stride, up_stride, dim, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    relu = tl.where(gate < 0.0, 0.0, gate)
    # As autograd has it: 0 where the gate is shut, even where up is infinite.
    grad_gate = tl.where(gate <= 0.0, 0.0, 2.0 * relu * up * grad)
    to = row * dim + column
    tl.store(grad_gate_ptr + to, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + to, (relu * relu * grad).to(grad_up_ptr.dtype.element_ty), mask=inside)


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], BLOCK)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    if out.numel():
        with torch.cuda.device_of(gate):
            op_name_fwd_kernel[_grid(gate)](
                gate, up, out, gate.stride(0), up.stride(0), gate.shape[1], BLOCK=BLOCK, num_warps=WARPS
            )  # fmt: skip
    return out


def backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if grad.numel():
        with torch.cuda.device_of(gate):
            op_name_bwd_kernel[_grid(gate)](
                gate, up, grad, grad_gate, grad_up, gate.stride(0), up.stride(0), gate.shape[1], BLOCK=BLOCK,
                num_warps=WARPS,
            )  # fmt: skip
    return grad_gate, grad_up


def _cases(name: str, kind: str) -> dict[str, tuple]:
    sizes = {"gate_stride": "i32:16", "up_stride": "i32:16", "dim": "i32:16"}
    inputs = {"gate_ptr": kind, "up_ptr": kind, **sizes}
    grads = {"grad_ptr": kind, "grad_gate_ptr": kind, "grad_up_ptr": kind}
    return {
        f"fwd_{name}": (op_name_fwd_kernel, {**inputs, "out_ptr": kind}, {"BLOCK": BLOCK}, WARPS),
        f"bwd_{name}": (op_name_bwd_kernel, {**inputs, **grads}, {"BLOCK": BLOCK}, WARPS),
    }


COMPILE_CASES = {**_cases("fp32", "*fp32"), **_cases("bf16", "*bf16")}
