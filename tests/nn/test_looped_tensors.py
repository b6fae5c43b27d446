"""Whose tensors the loops read: a module's own or a functional call's, frozen ones, buffers, captured ones; hooks."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from effkern.nn import Implicit, LoopedBlock, Truncated
from effkern.nn.looped import GraphedLoops
from tests.nn.looped_cases import DIM, Layer, by_hand, randomize
from tests.nn.looped_recorder import RecordingRecorder
from tests.numerics import rel_err

LOOPS = 4
OURS = ["full", "recompute", "recompute_layer", Truncated(LOOPS), Truncated(LOOPS, recompute=False)]


def stack(**options) -> LoopedBlock:
    return randomize(LoopedBlock([Layer(), Layer()], LOOPS, dim=DIM, dtype=torch.float64, **options))


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Shifted(nn.Module):
    """tanh(W h) + a buffer; W may be frozen."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(rand(DIM, DIM) * 0.2), nn.Parameter(rand(DIM))
        self.register_buffer("slope", torch.full((DIM,), 0.5, dtype=torch.float64))

    def forward(self, h):
        return torch.tanh(h @ self.weight.T * self.slope) + self.bias


@pytest.mark.parametrize("mode", [*OURS, Implicit(steps=200, tol=1e-14, backward="adjoint")], ids=str)
def test_a_functional_call_with_frozen_parameters_and_buffers(mode):
    """Backward runs on what the call had put in, also what has no gradient."""
    block = LoopedBlock([Shifted()], LOOPS, injection="add")
    x = rand(3, DIM).requires_grad_()
    bias = rand(DIM).requires_grad_()
    given = {"core.0.weight": rand(DIM, DIM) * 0.3, "core.0.bias": bias, "core.0.slope": rand(DIM).sigmoid()}
    loops = 300 if isinstance(mode, Implicit) else LOOPS
    y = torch.func.functional_call(block, given, (x,), {"mode": mode})
    got = torch.autograd.grad(y.square().sum(), [x, bias])
    y = torch.func.functional_call(block, given, (x,), {"mode": "autograd", "loops": loops})
    want = torch.autograd.grad(y.square().sum(), [x, bias])
    for a, b in zip(got, want):
        assert rel_err(a, b) < 1e-10
    assert (block.core[0].slope == 0.5).all()


def test_tied_parameters_that_a_functional_call_parts():
    block = LoopedBlock([Shifted(), Shifted()], LOOPS)
    block.core[1].weight = block.core[0].weight
    x, given = rand(3, DIM), {f"core.{i}.weight": (rand(DIM, DIM) * 0.3).requires_grad_() for i in range(2)}
    found = []
    for mode in ("recompute", "autograd"):
        call = torch.func.functional_call
        y = call(block, given, (x,), {"mode": mode}, tie_weights=False)
        found.append(torch.autograd.grad(y.square().sum(), list(given.values())))
    for a, b in zip(*found):
        assert rel_err(a, b) < 1e-12


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_a_frozen_parameter_changed_before_backward_is_refused(mode):
    block = stack()
    weight = block.core[1].linear.weight.requires_grad_(False)
    y = block(rand(3, DIM), mode=mode)
    with torch.no_grad():
        weight.mul_(2)
    # Of kept graphs torch says so.
    with pytest.raises(RuntimeError, match=r"parameters must stay as they are until backward|modified by an inplace"):
        y.sum().backward()


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_a_parameter_frozen_before_backward_is_refused(mode):
    block = stack()
    y = block(rand(3, DIM), mode=mode)
    block.core[1].linear.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="parameters must stay as they are until backward, got one frozen since"):
        y.sum().backward()


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_a_parameter_freed_before_backward_gets_no_gradient(mode):
    """As in torch's own graph."""
    block = stack()
    weight = block.core[1].linear.weight.requires_grad_(False)
    y = block(rand(3, DIM), mode=mode)
    weight.requires_grad_(True)
    y.sum().backward()
    assert weight.grad is None
    assert block.core[0].linear.weight.grad.abs().sum() > 0


class Captures(nn.Module):
    """Reads a tensor from around it, in the loops `when` only."""

    def __init__(self, outside, when):
        super().__init__()
        self.outside, self.when, self.bias = [outside], when, nn.Parameter(torch.zeros(DIM))

    def forward(self, x, depth):
        return x * self.outside[0] + self.bias if depth in self.when else x + self.bias


@pytest.mark.parametrize("mode", ["full", "recompute", "recompute_layer", Truncated(LOOPS)], ids=str)
@pytest.mark.parametrize("loop", range(LOOPS))
def test_a_tensor_captured_in_any_loop_is_refused(loop, mode):
    core = Captures(torch.ones(DIM, requires_grad=True), {loop})
    with pytest.raises(ValueError, match=r"core must get every tensor .* got one of shape \(6,\) from around it"):
        LoopedBlock([core], LOOPS, loop_argument="depth")(torch.randn(3, DIM), mode=mode).sum().backward()


@pytest.mark.parametrize("mode", ["full", "recompute", Truncated(LOOPS)], ids=str)
def test_a_tensor_captured_in_a_later_call_is_refused(mode):
    core = Captures(torch.ones(DIM, requires_grad=True), {})
    block = LoopedBlock(core, LOOPS, loop_argument="depth")
    block(torch.randn(3, DIM), mode=mode).sum().backward()
    core.when = {0}
    with pytest.raises(ValueError, match="core must get every tensor"):
        block(torch.randn(3, DIM), mode=mode).sum().backward()


class Around(nn.Module):
    def __init__(self, outside):
        super().__init__()
        self.outside = [outside]

    def forward(self, x):
        return x * self.outside[0]


def test_graphs_refuse_a_captured_tensor():
    graphed = GraphedLoops(LoopedBlock(Around(torch.ones(DIM, requires_grad=True)), 3), RecordingRecorder())
    with pytest.raises(ValueError, match="core must get every tensor"):
        graphed(torch.randn(3, DIM, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("name", ["core.0.weight", "core.0.slope"])
def test_graphs_refuse_a_functional_call(name):
    """They read memory, and what the call puts in has another."""
    block = LoopedBlock([Shifted()], LOOPS)
    graphed, x = GraphedLoops(block, RecordingRecorder()), rand(3, DIM)
    graphed(x)
    given = {"block." + name: rand(DIM, DIM).requires_grad_() if "weight" in name else rand(DIM)}
    with pytest.raises(RuntimeError, match="parameters must stay where they were recorded"):
        torch.func.functional_call(graphed, given, (x,))
    fresh = GraphedLoops(block, RecordingRecorder())
    y = torch.func.functional_call(fresh, given, (x,))
    with pytest.raises(RuntimeError, match="parameters must stay where they were recorded"):
        y.sum().backward()


@pytest.mark.parametrize("kind", [*OURS, "autograd", "graphed"], ids=str)
def test_hooks_that_change_a_gradient_change_the_sum_once(kind):
    block, x, fired = stack(), rand(7, DIM), []
    weight = block.core[0].linear.weight
    call = GraphedLoops(block, RecordingRecorder()) if kind == "graphed" else lambda x: block(x, mode=kind)
    (want,) = torch.autograd.grad(by_hand(block, x, LOOPS)[-1].sum(), weight)
    weight.register_hook(lambda grad: fired.append(1) or 0.5 * grad)
    for count in (1, 2):
        block.zero_grad()
        call(x).sum().backward()
        assert len(fired) == count
        assert rel_err(weight.grad, 0.5 * want) < 1e-12


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_the_first_call_of_a_block_inside_a_checkpoint(mode):
    """What a first backward looks at is all there."""
    block = stack(injection="gate", norm=True)
    x = rand(7, DIM).requires_grad_()
    y = checkpoint(block, x, mode=mode, use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    want = torch.autograd.grad(block(x, mode=mode).square().sum(), [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, want))
