"""A decoder in slices: FSDP2 over its blocks, and an output layer that stays in slices of the vocabulary.

N tokens of a micro-batch on one rank, P ranks, K entries of a cached label
"""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from effkern.distributed import vocab_parallel_distill_loss
from effkern.models import Block, Decoder
from effkern.nn import LaurelResidual, LoopedBlock
from effkern.ops.distill import TeacherHidden, TeacherTopK
from effkern.train.config import DistributedConfig

EMPTY = -1
"""Id of a slot that holds no label."""


def units(model: Decoder) -> list[nn.Module]:
    """What is gathered at once: a block, a looped stage (once, however often it runs), or the whole stack where its
    residuals share parameters. The embedding, the last norm and the head are the root's."""
    if any(isinstance(m, LaurelResidual) and m.kind.shared for m in model.modules()):
        return [model.stack]
    looped: list[nn.Module] = [m for m in model.modules() if isinstance(m, LoopedBlock)]
    inside = {id(part) for block in looped for part in block.modules()}
    return [*(m for m in model.modules() if id(m) not in inside and isinstance(m, Block)), *looped]


def shard(model: Decoder, mesh: Any, config: DistributedConfig, *, head: bool = True) -> None:
    """fully_shard the model over the mesh (two-dimensional: copies of slices), in place.

    The root keeps its weights between forward and backward, so that the loss finds the output layer whole; with
    config.vocab_parallel (and `head`) that layer is a DTensor that nobody gathers.
    """
    # Of blocks that return views, at every call: nothing here writes into what a block returned.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    ignored: set[nn.Parameter] = set()
    if config.vocab_parallel and head:
        assert model.head is not None
        weight = distribute_tensor(model.head.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        model.head.weight = nn.Parameter(weight)
        ignored = {model.head.weight}
    for unit in units(model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
        if isinstance(unit, LoopedBlock):
            register_fsdp_forward_method(unit, "all_states")
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)
    register_fsdp_forward_method(model, "loop_outputs")
    if ignored:
        # Every rank's gradient of the hidden states is that of the whole mean already: gradients add up.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def vocab_parallel_loss(
    hidden_ND: Tensor, weight: Tensor, labels_N: Tensor, *, teacher: Any = None, **options: Any
) -> Any:
    """linear_distill_loss over the tokens of all ranks, in the order of ranks, with the output layer in slices.

    Loss and statistics are those of all tokens, on every rank. A live teacher's head is whole on every rank, of which
    each takes the slice that it needs.
    """
    assert isinstance(weight, DTensor)
    group = weight.device_mesh.get_group()
    if isinstance(teacher, TeacherHidden):
        start = -(-weight.shape[0] // group.size()) * group.rank()
        rows = teacher.weight[start : start + weight.to_local().shape[0]]
        teacher = TeacherHidden(gather_rows(teacher.hidden, group), rows)
    elif isinstance(teacher, TeacherTopK):
        most = torch.tensor(teacher.ids.shape[1], device=hidden_ND.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        lacking = int(most) - teacher.ids.shape[1]
        ids = nn.functional.pad(teacher.ids, (0, lacking), value=EMPTY)
        logprobs = nn.functional.pad(teacher.logprobs, (0, lacking), value=0.0)
        teacher = TeacherTopK(gather_rows(ids, group), gather_rows(logprobs, group), teacher.kind)
    labels = gather_rows(labels_N, group)
    return vocab_parallel_distill_loss(hidden_ND, weight, labels, sequence_parallel=True, teacher=teacher, **options)


def gather_rows(part: Tensor, group: Any) -> Tensor:
    """The rows of all ranks, in their order; no gradient."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)
