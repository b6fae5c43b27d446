"""Loops as replays: the buffers' flow, on a recorder that repeats operations on fixed memory. No GPU takes part."""

import pytest
import torch
from torch import nn

from effkern.nn import LoopedBlock, PoissonLognormalLoops
from effkern.nn.looped import GraphedLoops
from tests.nn.looped_cases import DIM, Layer, randomize
from tests.nn.looped_recorder import RecordingRecorder
from tests.numerics import rel_err

PARTS = {
    "plain": {},
    "gate": {"injection": "gate", "norm": True},
    "linear": {"injection": "linear", "init": "zeros", "conditioning": "time"},
    "euler": {"residual": "euler", "injection": "add"},
    "laurel": {"residual": "laurel", "rank": 2, "conditioning": "table", "max_loops": 8},
    "layers": {"layer_scalars": "stream", "max_loops": 8, "init": "learned"},
}


def make(name, dtype=torch.float64):
    core = [Layer(dtype=dtype), Layer(dtype=dtype)]
    block = randomize(LoopedBlock(core, 4, dim=DIM, dtype=dtype, **PARTS[name]))
    recorder = RecordingRecorder()
    return block, GraphedLoops(block, recorder), recorder


def outcome(call, leaves, **options):
    y = call(leaves[0], **options)
    return [y.detach(), *torch.autograd.grad((y * y.detach().cos()).sum(), leaves)]


@pytest.mark.parametrize("name", PARTS)
def test_replays_give_the_blocks_numbers(name):
    """For any number of loops, by two recordings in all."""
    block, graphed, recorder = make(name)
    for loops in (1, 5, 2, 5):
        x = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
        leaves = [x, *block.parameters()]
        recorder.replays = 0
        got, want = outcome(graphed, leaves, loops=loops), outcome(block, leaves, loops=loops)
        assert recorder.replays == 2 * loops
        for a, b in zip(got, want):
            assert rel_err(a, b.double()) < 1e-12 if a.dtype == torch.float64 else rel_err(a, b.double()) < 1e-6
        # An optimizer that works in place is seen.
        with torch.no_grad():
            for p in block.parameters():
                p.mul_(0.9)
    assert recorder.recordings == 2


def test_nothing_is_recorded_or_kept_for_backward_without_a_gradient():
    block, graphed, recorder = make("gate")
    x = torch.randn(3, DIM, dtype=torch.float64)
    with torch.no_grad():
        assert rel_err(graphed(x, loops=6), block(x, loops=6)) < 1e-13
    assert (recorder.recordings, recorder.replays) == (1, 6)


def test_arguments_and_what_differs_by_layer():
    block, graphed, recorder = make("plain")
    for loops in (3, 2):
        x, mask = (torch.randn(3, 4, DIM, dtype=torch.float64, requires_grad=True) for _ in range(2))
        scale = torch.randn(loops, 2, dtype=torch.float64, requires_grad=True)
        found = []
        for call in (graphed, block):
            y = call(x, mask, loops=loops, per_layer={"scale": scale})
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, mask, scale, *block.parameters()])])
        for a, b in zip(*found):
            assert rel_err(a, b) < 1e-12
    assert recorder.recordings == 2


def test_two_calls_in_one_graph_and_a_second_backward():
    """Buffers are shared; what a call needs for its backward is its own."""
    block, graphed, _ = make("gate")
    x = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    leaves, found = [x, *block.parameters()], []
    for call in (graphed, block):
        y = (call(x, loops=3) * call(torch.sin(call(x, loops=2)))).sum()
        first = torch.autograd.grad(y, leaves, retain_graph=True)
        second = torch.autograd.grad(y, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        found.append(first)
    for a, b in zip(*found):
        assert rel_err(a, b.double()) < 1e-6 if a.dtype == torch.float32 else rel_err(a, b) < 1e-11


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision(dtype, autocast):
    """The bits of the block's own recompute; a change of autocast is another recording."""
    block, graphed, recorder = make("plain", dtype)
    x = torch.randn(5, DIM, dtype=dtype, requires_grad=True)
    leaves = [x, *block.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, z = graphed(x), block(x)
    assert torch.equal(y, z)
    for a, b in zip(torch.autograd.grad(y.float().sum(), leaves), torch.autograd.grad(z.float().sum(), leaves)):
        assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16, enabled=not autocast):
        graphed(x)
    assert recorder.recordings == 3


def test_weights_cast_by_autocast_are_read_anew():
    block, graphed, _ = make("plain", torch.float32)
    x = torch.randn(5, DIM)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
            assert torch.equal(graphed(x), block(x))
        with torch.no_grad():
            block.core[0].linear.weight.mul_(-1)


def test_main_grad_and_drawn_loops():
    block, graphed, recorder = make("plain", torch.bfloat16)
    block.main_grad, block.loops = True, PoissonLognormalLoops(4)
    x = torch.randn(5, DIM).bfloat16()
    for step in range(4):
        graphed(x, step=step).float().sum().backward()
    sums = [p.main_grad.clone() for p in block.parameters()]
    for p in block.parameters():
        p.main_grad.zero_()
    for step in range(4):
        block(x, step=step).float().sum().backward()
    for p, total in zip(block.parameters(), sums):
        assert p.grad is None
        assert rel_err(total, p.main_grad.double()) < 1e-6
    assert recorder.recordings == 2


class Doubling(nn.Module):
    def forward(self, x):
        return torch.where(x.abs() > 7.5, torch.inf, 2 * x)


def test_errors():
    x = torch.randn(3, DIM, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="GraphedLoops: block must have no loop_argument, got 't'"):
        GraphedLoops(LoopedBlock(Layer(), 2, loop_argument="t"), RecordingRecorder())
    dropping = LoopedBlock(Layer(dropout=0.5), 2)
    state = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match="GraphedLoops: core must draw no random numbers"):
        GraphedLoops(dropping, RecordingRecorder())(x)
    assert torch.equal(torch.get_rng_state(), state)
    block, graphed, _ = make("plain")
    with pytest.raises(NotImplementedError, match="per_layer must hold tensors of one shape in all loops, got others"):
        graphed(x, per_layer={"scale": [[1.0, 1.0]] * 3 + [[2.0, 1.0]]})
    y = graphed(x)
    block.core[0].linear.weight.data = block.core[0].linear.weight.data.clone()
    with pytest.raises(RuntimeError, match="parameters must stay where they were recorded, got one moved"):
        graphed(x)
    with pytest.raises(RuntimeError, match="parameters must stay where they were recorded, got one moved"):
        y.sum().backward()
    checked = GraphedLoops(LoopedBlock(Doubling(), 6, check_finite=True), RecordingRecorder())
    with pytest.raises(FloatingPointError, match="after loop 3"):
        checked(torch.ones(2, 2))
