"""A residual and the RMSNorm behind it: y = x + f, z = norm(y), forward, or forward and all gradients."""

from collections.abc import Callable
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.peer import Family, Peer, Trial
from effkern import laurel_residual

EPS = 1e-6
Sum = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Inputs:
    """Branch and stream [N, D], weight [D], and the gradients that arrive at y and z."""

    def __init__(self, case: dict[str, Any], device: str) -> None:
        torch.manual_seed(0)
        dtype, shape = getattr(torch, case["dtype"]), (case["rows"], case["dim"])
        self.branch, self.x, *self.grads = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
        self.weight = (1 + 0.1 * torch.randn(case["dim"], device=device)).to(dtype)
        self.both = case["pass"] == "both"
        for t in self.tensors():
            t.requires_grad_()

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.branch, self.x, self.weight


def cases(quick: bool) -> list[dict[str, Any]]:
    sizes = {"rows": 8192, "dim": 2048, "pass": "both"}
    if quick:
        return [{**sizes, "dtype": "float32"}]
    return [{**sizes, "dtype": d, "pass": p} for d in ("float32", "bfloat16") for p in ("forward", "both")]


def plain(branch: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y = x + branch
    return y, F.rms_norm(y, weight.shape, weight, EPS)


def run(function: Sum, tensors: tuple[Tensor, ...], grads: list[Tensor], both: bool) -> list[Tensor]:
    if not both:
        with torch.no_grad():
            return list(function(*tensors))
    out = function(*tensors)
    return [*out, *torch.autograd.grad(out, tensors, grads)]


def in_float64(i: Inputs) -> list[Tensor]:
    wide = tuple(t.detach().double().requires_grad_() for t in i.tensors())
    return run(plain, wide, [g.double() for g in i.grads], i.both)


def trial(i: Inputs, function: Sum) -> Trial:
    last: list[Tensor] = []

    def step() -> None:
        last[:] = run(function, i.tensors(), i.grads, i.both)

    return Trial(step, lambda: last)


def ours(branch: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = laurel_residual(branch, x, norm_weight=weight, norm_eps=EPS)
    assert out.normed is not None
    return out.y, out.normed


def liger_norm(i: Inputs) -> Trial:
    """Its RMSNorm behind torch's addition."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def function(branch: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = x + branch
        return y, LigerRMSNormFunction.apply(y, weight, EPS, 0.0, "llama", False, None)

    return trial(i, function)


def liger_fused(i: Inputs) -> Trial:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def function(branch: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        z, y = LigerFusedAddRMSNormFunction.apply(branch, x, weight, EPS, 0.0, "llama", False)
        return y, z

    return trial(i, function)


def compiled(i: Inputs) -> Trial:
    return trial(i, torch.compile(plain, dynamic=False))


LIGER: dict[str, Any] = {
    "package": "liger-kernel", "devices": ("cuda",), "why_not": "its kernels are Triton's and need a GPU",
}  # fmt: skip
FAMILY = Family(
    "add_norm",
    "y = x + f and the RMSNorm of y, forward or with the gradients of all inputs",
    cases,
    make=Inputs,
    small={"rows": 64, "dim": 256},
    references={"float64": in_float64},
    peers=(
        Peer("effkern", lambda i: trial(i, ours)),
        Peer("eager", lambda i: trial(i, plain)),
        Peer("torch.compile", compiled),
        Peer("Liger RMSNorm", liger_norm, **LIGER),
        Peer("Liger fused add + RMSNorm", liger_fused, **LIGER),
    ),
)
