"""The loops in torch's own graph: what can be differentiated twice, traced as a whole, and has FSDP inside."""

import sys

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effkern.nn.looped.engine import Job
from effkern.nn.looped.finite import FiniteFlags


def by_autograd(job: Job, carry: Tensor, again: bool) -> tuple[Tensor, ...]:
    """The last state, or every one; `again`: each loop is checkpointed."""
    flags, states, total = FiniteFlags(job.body.check_finite), [], len(job.plan.loops)
    for t in range(total):
        if t < job.first:
            with torch.no_grad():
                # A core may return what it got.
                state, carry = (z.detach() for z in job.loop(job.plan, t, carry))
        elif again and torch.is_grad_enabled():
            state, carry = checkpoint(job.loop, job.plan, t, carry, job.by_layer, use_reentrant=False)
        else:
            state, carry = job.loop(job.plan, t, carry)
        flags.add(state)
        if job.all_states or t + 1 == total:
            states.append(state)
    flags.check()
    return tuple(states)


def has_fsdp_inside(core: nn.Module) -> bool:
    """Whether FSDP gathers the core, or parts of it, on its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    return any(isinstance(m, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for m in core.modules())
