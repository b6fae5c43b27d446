"""The parameters that Shampoo leaves to AdamW, in torch's own fused kernels.

Those kernels walk through memory without looking at strides, and a gradient that is not finite stays in the second
moment for ever: both are dealt with here.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from effkern.optim.shampoo.sharded import is_sharded, local, same_device_zeros

MOMENTS = ("exp_avg", "exp_avg_sq")


class Plain:
    """Parameters of one group on one device, which step together or, where a gradient is not finite, not at all."""

    def __init__(self, device: torch.device) -> None:
        self.members: list[tuple[str, Tensor, dict[str, Any]]] = []
        """Name, parameter and state."""
        self.device = device

    def allocate(self) -> None:
        """Gradients in a row that were not finite."""
        self.bad = torch.zeros(len(self.members), dtype=torch.int32, device=self.device)

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.members]

    def step_(self, group: dict[str, Any]) -> None:
        """One step of those that have a gradient; of sharded ones each process steps its part."""
        live = [i for i, (_, p, _) in enumerate(self.members) if p.grad is not None]
        if not live:
            return
        parameters = [self.members[i][1] for i in live]
        states = [self.members[i][2] for i in live]
        for p, state in zip(parameters, states):
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state.update({key: same_device_zeros(p, p.dtype) for key in MOMENTS})
        bad = _not_finite(parameters)
        counts = [self.bad[i] for i in live]
        torch._foreach_copy_(counts, list(torch.where(bad, torch.stack(counts) + 1, 0).unbind()))
        lr, (beta1, beta2) = group["lr"], group["adamw_betas"]
        own = [local(p.detach()) for p in parameters]
        weights = [w if is_dense(w) else w.clone() for w in own]
        moments = [[_moment(p, state, key, w) for p, state, w in zip(parameters, states, weights)] for key in MOMENTS]
        adamw(
            weights,
            [_laid_out_as(w, local(p.grad)) for w, p in zip(weights, parameters) if p.grad is not None],
            moments[0],
            moments[1],
            [],
            [state["step"] for state in states],
            foreach=False,
            fused=True,
            found_inf=bad.any().float(),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for w, stepped in zip(own, weights):
            if w is not stepped:
                w.copy_(stepped)
        # The kernel does not tell autograd what it wrote.
        torch.autograd.graph.increment_version([*parameters, *(state[key] for state in states for key in MOMENTS)])


def is_dense(tensor: Tensor) -> bool:
    """Whether its numbers fill a piece of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _laid_out_as(weight: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the weight's dtype and order in memory."""
    if tensor.dtype == weight.dtype and tensor.stride() == weight.stride() and is_dense(tensor):
        return tensor
    return torch.empty_like(weight).copy_(tensor)


def _moment(parameter: Tensor, state: dict[str, Any], key: str, weight: Tensor) -> Tensor:
    """A state laid out as the weight is, which may have changed since the last step."""
    found = local(state[key])
    if _laid_out_as(weight, found) is not found:
        state[key] = same_device_zeros(parameter, weight.dtype)
        found = local(state[key]).copy_(found)
    return found


def _not_finite(parameters: Sequence[Tensor]) -> Tensor:
    """Which gradients hold NaN or Inf, as bool [parameters], the same on all processes that share one of them."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    filled = [g for g in grads if g.numel()]
    largest = iter(torch._foreach_norm(filled, float("inf")) if filled else ())
    zero = torch.zeros((), device=grads[0].device)
    bad = ~torch.stack([next(largest) if g.numel() else zero for g in grads]).isfinite()
    meshes = {p.device_mesh: None for p in parameters if is_sharded(p)}  # type: ignore[attr-defined]
    for mesh in meshes:
        for dim in (d for d in range(mesh.ndim) if mesh.size(d) > 1):
            shared = bad.float()
            dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
            bad = shared > 0
    return bad
