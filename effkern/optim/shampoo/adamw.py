"""The parameters that Shampoo leaves to AdamW, in torch's own kernels."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from effkern.optim.shampoo.sharded import local, same_device_zeros


def is_fused(parameter: Tensor) -> bool:
    """Whether torch has a fused AdamW for its device."""
    return parameter.device.type in ("cpu", "cuda", "xpu")


def adamw_(group: dict[str, Any], parameters: list[tuple[Tensor, dict[str, Any]]]) -> None:
    """One step of those that have a gradient; of sharded ones each process steps its part."""
    live = [(p, state) for p, state in parameters if p.grad is not None]
    if not live:
        return
    fused = all(is_fused(p) for p, _ in live)
    for p, state in live:
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = (same_device_zeros(p, p.dtype) for _ in range(2))
    beta1, beta2 = group["adamw_betas"]
    adamw(
        [local(p.detach()) for p, _ in live],
        [local(p.grad) for p, _ in live if p.grad is not None],
        [local(state["exp_avg"]) for _, state in live],
        [local(state["exp_avg_sq"]) for _, state in live],
        [],
        [state["step"] for _, state in live],
        foreach=not fused,
        fused=fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
