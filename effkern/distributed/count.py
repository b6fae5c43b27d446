"""The denominator of a mean over the tokens of all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

OP = "global_count"


def global_count(
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int = -100,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    averaged: bool = False,
) -> Tensor:
    """Sum of w_n over the rows that count on all ranks, to be passed as `denom`.

    G = sum over ranks, and over n with labels_n != ignore_index, of w_n;  G / P if `averaged`, P ranks in the group

    With denom = G the losses of the ranks, and their gradients, add up to those of the mean over all tokens. DDP and
    FSDP do not add, they average the gradients over the P ranks: there denom has to be G / P, and then the average is
    exactly the mean over all tokens, however unevenly they are spread. Dividing each rank's sum by its own count,
    which is the default of the losses, gives tokens on ranks with few of them a larger weight.

        denom = effkern.distributed.global_count(labels, averaged=True)
        effkern.linear_distill_loss(hidden, weight, labels, denom=denom).loss.backward()

    For logging, the average of the ranks' losses (the sum, without `averaged`) is the mean over all tokens.
    With gradient accumulation, pass the labels of all steps, and the result to each step.
    With vocabulary parallelism, `group` is that of the data-parallel ranks, which hold different tokens.

    Args:
        labels: any shape and integer dtype.
        weights: same shape, or None for ones.
        group: process group or device mesh of one dimension; None: all processes.
        averaged: for gradients that are averaged over the group.

    Returns:
        0-d float64 tensor on the device of `labels`, without gradient; exact for counts. A rank without tokens calls
        it as well. If no rank has any, it is 0, and so is the loss.

    Raises:
        ValueError: shapes differ, or the mesh has several dimensions.
        RuntimeError: no process group.

    Communication: one all-reduce of 8 bytes. Nothing waits for the device.
    """
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"{OP}: weights must have shape {list(labels.shape)}, got {list(weights.shape)}")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{OP}: group must be a device mesh of one dimension, got {group.ndim}")
        group = group.get_group()
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"{OP}: torch.distributed must be initialised, got no process group")
    kept = labels != ignore_index
    if weights is None:
        count = kept.sum().double()
    else:
        count = torch.where(kept, weights.detach(), 0).sum(dtype=torch.float64)
    dist.all_reduce(count, group=group)
    return count / dist.get_world_size(group) if averaged else count
