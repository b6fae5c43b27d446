"""Cross entropy of a linear layer without keeping the logits: loss and the gradients of hidden states and weight."""

from collections.abc import Callable
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import distill
from benchmarks.ops.distill import Inputs
from benchmarks.peers.peer import Family, Peer, Trial

Loss = Callable[[Inputs], Tensor]


def cases(quick: bool) -> list[dict[str, Any]]:
    sizes = {"rows": 1024, "dim": 512, "vocab": 32000}
    return [{**sizes, "dtype": dtype} for dtype in (["float32"] if quick else ["float32", "bfloat16"])]


def make(case: dict[str, Any], device: str) -> Inputs:
    dtype = getattr(torch, case["dtype"])
    return distill.make("forward_kl", "hard", case["rows"], case["dim"], case["vocab"], 1, dtype, device)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def in_float64(x: Inputs) -> list[Tensor]:
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
    loss = plain(hidden, weight, x.labels)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def trial(x: Inputs, loss: Loss) -> Trial:
    """Forward and backward from empty gradients, as a training step has it."""
    last: list[Tensor] = []

    def step() -> None:
        x.hidden.grad = x.weight.grad = None
        last[:] = [loss(x)]
        last[0].backward()

    def result() -> list[Tensor]:
        assert x.hidden.grad is not None
        assert x.weight.grad is not None
        return [last[0], x.hidden.grad, x.weight.grad]

    return Trial(step, result)


def products(x: Inputs) -> Trial:
    """The bare products, which have no result to compare."""
    run = distill.products(x)
    return Trial(run, lambda: in_float64(x))


def compiled(x: Inputs) -> Trial:
    function = torch.compile(plain)
    return trial(x, lambda x: function(x.hidden, x.weight, x.labels))


def torch_linear(options: Callable[[], Any]) -> Callable[[Inputs], Trial]:
    def build(x: Inputs) -> Trial:
        if not hasattr(F, "linear_cross_entropy"):
            raise NotImplementedError(f"torch {torch.__version__} has no linear_cross_entropy")
        chosen = options()
        return trial(x, lambda x: F.linear_cross_entropy(x.hidden, x.weight, x.labels, options=chosen))

    return build


def chunked_options() -> Any:
    return torch.nn.LinearCrossEntropyOptions()


def cut(impl: str) -> Callable[[Inputs], Trial]:
    def build(x: Inputs) -> Trial:
        from cut_cross_entropy import linear_cross_entropy

        if impl == "cce" and x.hidden.dtype == torch.float32:
            raise NotImplementedError("its kernels take half precision alone, got float32")
        return trial(x, lambda x: linear_cross_entropy(x.hidden, x.weight, x.labels, impl=impl))

    return build


def liger(x: Inputs) -> Trial:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return trial(x, lambda x: loss(x.weight, x.hidden, x.labels))


TRITON = "its kernels are Triton's and need a GPU"
FAMILY = Family(
    "cross_entropy",
    "loss and gradients of cross_entropy(hidden @ weight^T, labels), mean over rows",
    cases,
    make,
    {"rows": 64, "dim": 64, "vocab": 1000},
    {"float64": in_float64},
    (
        Peer("products", products),
        Peer("effkern", lambda x: trial(x, distill.effkern_loss)),
        Peer("eager", lambda x: trial(x, lambda x: plain(x.hidden, x.weight, x.labels))),
        Peer("torch.compile", compiled),
        Peer("torch linear_cross_entropy", torch_linear(lambda: None)),
        Peer("torch linear_cross_entropy, chunked", torch_linear(chunked_options)),
        Peer("cut-cross-entropy", cut("cce"), package="cut-cross-entropy", devices=("cuda",), why_not=TRITON),
        Peer("cut-cross-entropy, torch_compile", cut("torch_compile"), package="cut-cross-entropy"),
        Peer(
            "Liger fused linear cross entropy", liger, package="liger-kernel", devices=("cuda",), why_not=TRITON
        ),
    ),
)  # fmt: skip
