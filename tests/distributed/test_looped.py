"""Looped blocks under DDP and FSDP2 in two processes: gradients of one process, and one reduction a parameter."""

import pytest
import torch

from effkern.nn import PoissonLognormalLoops
from tests.distributed.looped_worker import LOOPS, MODES, WORLD, Model, batch
from tests.numerics import rel_err


@pytest.fixture
def pair(group):
    if len(group) != WORLD:
        pytest.skip("two processes")
    return group


def truth(mode, loops=LOOPS):
    """Gradients of one process with the rows of both, in torch's own graph where it has this mode."""
    model = Model()
    mode = "autograd" if isinstance(mode, str) else mode
    (sum(model(batch(rank), mode, loops) for rank in range(WORLD)) / WORLD).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
def test_ddp_without_a_search_for_unused_parameters(pair, mode):
    for outcomes, reduced in (found[f"looped-ddp-{mode}"] for found in pair):
        for got, loops in zip(outcomes, (LOOPS, 3)):
            want = truth(MODES[mode], loops)
            for grad, (name, expected) in zip(got, want.items()):
                assert rel_err(grad, expected) < 1e-12, name
        # Once in each of two steps, whatever their loops.
        assert reduced == dict.fromkeys(want, 2)


@pytest.mark.parametrize("kind", ["fsdp", "fsdp-layers"])
@pytest.mark.parametrize("mode", MODES)
def test_fsdp(pair, mode, kind):
    want = truth(MODES[mode])
    for got, _ in (found[f"looped-{kind}-{mode}"] for found in pair):
        for grad, (name, expected) in zip(got, want.items()):
            assert rel_err(grad, expected) < 1e-12, name


@pytest.mark.parametrize("mode", MODES)
def test_the_block_is_gathered_and_reduced_once_whatever_its_loops(pair, mode):
    for _, counts in (found[f"looped-fsdp-{mode}"] for found in pair):
        assert counts[0] == counts[1]
        gathers, reductions = (
            [n for op, n in counts[0].items() if word in op] for word in ("gather", "reduce_scatter")
        )
        # Three units, forward and backward; torch may keep the last one gathered.
        assert sum(reductions) == 3
        assert 3 <= sum(gathers) <= 6


def test_fsdp_in_half_precision(pair):
    want = truth("recompute")
    for got, _ in (found["looped-fsdp-half"] for found in pair):
        for grad, (name, expected) in zip(got, want.items()):
            assert rel_err(grad, expected) < 0.03, name


def test_draws_are_equal_on_all_ranks(pair):
    mine = [PoissonLognormalLoops(20).draw(step, seed=3) for step in range(10)]
    assert all(found["looped-draws"] == mine for found in pair)
    assert len(set(mine)) > 3
    assert torch.tensor(mine).min() >= 1
