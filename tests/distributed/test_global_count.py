"""The global denominator: gradients of several ranks with different numbers of tokens equal those of one process."""

import pytest
import torch
import torch.distributed as dist

from effkern import distributed
from tests.distributed.count_worker import Model, batch


def truth(ranks: int, world: int, weighted: bool = False):
    """Loss and gradients of one process with the rows of all ranks."""
    x, labels, teacher, weights = (torch.cat(parts) for parts in zip(*(batch(rank, world) for rank in range(ranks))))
    model = Model()
    loss = model(x, labels, teacher, weights if weighted else None, None)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ddp", "ddp-weights", "fsdp", "summed"])
def test_gradients_are_those_of_one_process(group, name):
    """DDP and FSDP average over the ranks, the last of which has no token; a sum needs the count itself."""
    world = len(group)
    loss, grads = truth(world, world, weighted=name == "ddp-weights")
    losses = torch.stack([found[name][0] for found in group])
    close(losses.sum() if name == "summed" else losses.mean(), loss)
    assert losses[-1] == 0
    for found in group:
        for got, want in zip(found[name][1], grads):
            close(got, want)


def test_count(group):
    world = len(group)
    labels = torch.cat([batch(rank, world)[1] for rank in range(world)])
    weights = torch.cat([batch(rank, world)[3] for rank in range(world)])
    for found in group:
        assert found["count"].dtype == torch.float64
        assert found["count"] == (labels >= 0).sum()
        close(found["weighted"], weights[labels >= 0].sum())
        assert found["nobody"] == 0


def test_data_and_vocabulary_parallel(group):
    """A mesh of 2 x 2: the denominator over the ranks with other tokens, the loss over those with other slices."""
    if len(group) != 4:
        pytest.skip("needs 4 ranks")
    loss, grads = truth(2, 3)
    for slot in range(2):
        close(group[slot]["both"][0] + group[2 + slot]["both"][0], loss)
    for rank, found in enumerate(group):
        got = found["both"][1]
        for n in range(2):
            close(got[n], grads[n])
            close(got[2 + n], grads[2 + n].chunk(2)[rank % 2])


def test_fsdp_and_vocabulary_parallel(group):
    """The same with FSDP, an output layer of DTensors, and the whole gradient put together from all ranks."""
    if len(group) != 4:
        pytest.skip("needs 4 ranks")
    loss, grads = truth(2, 3)
    close((group[0]["both-fsdp"][0] + group[2]["both-fsdp"][0]) / 2, loss)
    for found in group:
        for got, want in zip(found["both-fsdp"][1], grads):
            close(got, want)


def test_errors():
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"global_count: weights must have shape \[3\], got \[2\]"):
        distributed.global_count(labels, torch.ones(2))
    assert not dist.is_initialized()
    with pytest.raises(
        RuntimeError, match=r"global_count: torch.distributed must be initialised, got no process group"
    ):
        distributed.global_count(labels)
    with pytest.raises(
        RuntimeError, match=r"vocab_parallel_distill_loss: group must be given, or torch.distributed be"
    ):
        distributed.vocab_parallel_distill_loss(torch.ones(3, 2), torch.ones(4, 2), labels)
