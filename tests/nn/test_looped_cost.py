"""What the loops cost in time: process CPU time on one thread, the least of several rounds in turn."""

import time

import pytest
import torch
from torch import nn

from effkern.nn import LoopedBlock

LOOPS, ROUNDS = 8, 9


def least(calls, x):
    """Seconds of a forward and backward pass."""
    threads, found = torch.get_num_threads(), dict.fromkeys(calls, float("inf"))
    torch.set_num_threads(1)
    try:
        for _ in range(ROUNDS):
            for name, call in calls.items():
                x.grad, begin = None, time.process_time()
                call(x).backward(x.detach())
                found[name] = min(found[name], time.process_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return found


def core():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.TransformerEncoderLayer(256, 8, 768, 0.0, batch_first=True) for _ in range(2)))


@pytest.mark.slow
def test_recompute_takes_at_most_1_36_times_full_storage():
    block, x = LoopedBlock(core(), LOOPS), torch.randn(4, 128, 256, requires_grad=True)
    found = least({mode: lambda x, mode=mode: block(x, mode=mode) for mode in ("full", "recompute")}, x)
    assert found["recompute"] <= 1.36 * found["full"]


@pytest.mark.slow
def test_the_block_takes_at_most_two_percent_more_than_a_loop_by_hand():
    layers, x = core(), torch.randn(4, 128, 256, requires_grad=True)
    block = LoopedBlock(layers, LOOPS, injection="add")

    def by_hand(x):
        h = x
        for _ in range(LOOPS):
            h = layers(h + x)
        return h

    found = least({"block": lambda x: block(x, mode="full"), "hand": by_hand}, x)
    assert found["block"] <= 1.02 * found["hand"]
