"""Distillation with both output layers inside: (1 - omega) CE + omega D(teacher, student), loss and gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip  # noqa: F401

import torch
from torch import Tensor

from benchmarks import handwritten
from benchmarks.handwritten import OMEGA
from benchmarks.ops import distill
from benchmarks.ops.distill import Inputs
from benchmarks.peers.cross_entropy import TRITON, trial
from benchmarks.peers.peer import Family, Peer, Trial


def cases(quick: bool) -> list[dict[str, Any]]:
    sizes = {"rows": 1024, "dim": 512, "teacher_dim": 512, "vocab": 32000, "dtype": "float32"}
    return [{"divergence": name, **sizes} for name in (["jsd"] if quick else ["forward_kl", "jsd", "cosine"])]


def make(case: dict[str, Any], device: str) -> Inputs:
    sizes = (case["rows"], case["dim"], case["vocab"], case["teacher_dim"])
    return distill.make(case["divergence"], "hidden", *sizes, getattr(torch, case["dtype"]), device)


def in_float64(x: Inputs) -> list[Tensor]:
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
    assert x.teacher_hidden is not None
    assert x.teacher_weight is not None
    teacher = x.teacher_hidden.double() @ x.teacher_weight.double().t()
    loss = handwritten.loss(x.divergence, hidden, weight, x.labels, teacher)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def products(x: Inputs) -> Trial:
    run = distill.products(x)
    return Trial(run, lambda: in_float64(x))


def compiled(x: Inputs) -> Trial:
    function = torch.compile(partial(handwritten.loss, x.divergence))
    return trial(x, lambda x: distill.eager_loss(x, function))


def liger_chunked(compile_it: bool) -> Callable[[Inputs], Trial]:
    def build(x: Inputs) -> Trial:
        from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss, LigerFusedLinearJSDLoss

        if x.divergence not in distill.LIGER:
            raise NotImplementedError(f"it has no chunked {x.divergence}")
        given: dict[str, Any] = {"weight_hard_loss": 1 - OMEGA, "weight_soft_loss": OMEGA, "compiled": compile_it}
        beta = distill.LIGER[x.divergence]
        loss = (
            LigerFusedLinearCosineSimilarityLoss(**given)
            if beta is None
            else LigerFusedLinearJSDLoss(**given, beta=beta)
        )
        return trial(x, lambda x: loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels))

    return build


def liger_fused(x: Inputs) -> Trial:
    """Two of its losses, as it has no fused one of the sum: the student's logits are made twice."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    beta = distill.LIGER.get(x.divergence)
    if beta is None:
        raise NotImplementedError(f"it has no fused {x.divergence}")
    hard, soft = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearJSD(jsd_beta=beta)

    def loss(x: Inputs) -> Tensor:
        divergence = soft(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight)
        return (1 - OMEGA) * hard(x.weight, x.hidden, x.labels) + OMEGA * divergence

    return trial(x, loss)


def liger_probabilities(x: Inputs) -> Trial:
    """KL against probabilities that are made beforehand by the teacher's output layer, outside of any fusion."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearKLDivLoss

    if x.divergence != "forward_kl":
        raise NotImplementedError(f"it has no {x.divergence} against probabilities")
    hard, soft = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearKLDivLoss()

    def loss(x: Inputs) -> Tensor:
        assert x.teacher_hidden is not None
        assert x.teacher_weight is not None
        target = (x.teacher_hidden @ x.teacher_weight.t()).float().softmax(-1)
        return (1 - OMEGA) * hard(x.weight, x.hidden, x.labels) + OMEGA * soft(x.hidden, x.weight, target)

    return trial(x, loss)


LIGER: dict[str, Any] = {"package": "liger-kernel"}
GPU: dict[str, Any] = {"devices": ("cuda",), "why_not": TRITON}
FAMILY = Family(
    "distillation",
    "loss and gradients of (1 - omega) CE + omega D, hidden states and output layers of student and teacher given",
    cases,
    make,
    {"rows": 64, "dim": 64, "teacher_dim": 48, "vocab": 1000},
    {"float64": in_float64},
    (
        Peer("products", products),
        Peer("effkern", lambda x: trial(x, distill.effkern_loss)),
        Peer("eager", lambda x: trial(x, distill.eager_loss)),
        Peer("torch.compile", compiled),
        Peer("Liger chunked", liger_chunked(False), module="liger_kernel.chunked_loss", **LIGER),
        Peer("Liger chunked, compiled", liger_chunked(True), module="liger_kernel.chunked_loss", **LIGER),
        Peer("Liger fused JSD and CE", liger_fused, **LIGER, **GPU),
        Peer("Liger fused KL and CE", liger_probabilities, **LIGER, **GPU),
    ),
)
