"""LoopedBlock among what surrounds a model: autocast, checkpoints, functional calls; and what it refuses."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from effkern.nn import LoopedBlock
from tests.nn.looped_cases import DIM, LOOPS, OURS, Layer, by_hand, randomize, results, stack
from tests.numerics import rel_err


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_autocast_leaves_nothing_behind(mode):
    """Weights read again under the same autocast still get a gradient, as casts without a graph are not kept."""
    block, x = stack(), torch.randn(7, DIM)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x, mode=mode) + block.core[0](x)
        (grad,) = torch.autograd.grad(y.sum(), block.core[0].linear.weight)
        with torch.autocast("cpu", torch.bfloat16):
            y = by_hand(block, x, LOOPS)[-1] + block.core[0](x)
        (want,) = torch.autograd.grad(y.sum(), block.core[0].linear.weight)
        assert rel_err(grad, want.double()) < 0.02


class FullPrecisionInside(Layer):
    def forward(self, z):
        with torch.autocast("cpu", enabled=False):
            return super().forward(z.float())


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_products_in_float32_under_autocast_have_a_backward_in_float32(mode):
    """What runs again runs under autocast, its backward does not."""
    block, x = LoopedBlock([FullPrecisionInside(dtype=torch.float32)], LOOPS), torch.randn(7, DIM)
    got, want = (results(block, x, m, dtype=torch.bfloat16) for m in (mode, "autograd"))
    assert all(rel_err(a, b.double()) < 1e-5 for a, b in zip(got, want))


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_backward_under_another_autocast_than_forward(mode):
    block, x = stack(), torch.randn(7, DIM)
    want = torch.autograd.grad(block(x, mode=mode).sum(), list(block.parameters()))
    y = block(x, mode=mode).sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, list(block.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


class CheckpointedLayer(Layer):
    def forward(self, z):
        return checkpoint(super().forward, z, use_reentrant=False)


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_checkpointing_inside_the_core(mode):
    block = randomize(LoopedBlock([CheckpointedLayer(dropout=0.3) for _ in range(2)], LOOPS))
    x = torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    outcomes = []
    for plain in (False, True):
        torch.manual_seed(1)
        y = by_hand(block, x, LOOPS)[-1] if plain else block(x, mode=mode)
        outcomes.append(torch.autograd.grad(y.sum(), leaves))
    assert all(rel_err(a, b) < 1e-12 for a, b in zip(*outcomes))


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_the_block_inside_a_checkpoint(mode):
    block, x = stack(torch.float64, dropout=0.2), torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)
    leaves, found = [x, *block.parameters()], []
    for around in (False, True):
        torch.manual_seed(1)
        y = checkpoint(block, x, mode=mode, use_reentrant=False) if around else block(x, mode=mode)
        found.append(torch.autograd.grad(y.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_a_functional_call(mode):
    """Backward finds the parameters that the call had put in."""
    block = stack(torch.float64, injection="gate", norm=True)
    x = torch.randn(7, DIM, dtype=torch.float64)
    scale = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    given = {n: p.detach().clone().requires_grad_() * scale for n, p in block.named_parameters()}
    y = torch.func.functional_call(block, given, (x,), {"mode": mode})
    (got,) = torch.autograd.grad(y.square().sum(), scale, retain_graph=True)
    y = torch.func.functional_call(block, given, (x,), {"mode": "autograd"})
    (want,) = torch.autograd.grad(y.square().sum(), scale)
    assert rel_err(got, want) < 1e-6
    assert abs(want) > 1e-3


class Captures(nn.Module):
    def __init__(self, outside):
        super().__init__()
        self.outside = [outside]

    def forward(self, x):
        return x * self.outside[0]


@pytest.mark.parametrize("mode", OURS[:2] + OURS[3:], ids=str)
def test_a_captured_tensor_is_refused(mode):
    """Its gradient would be lost without a word."""
    outside = torch.ones(DIM, requires_grad=True)
    x = torch.randn(3, DIM, requires_grad=True)
    for captured in (outside, outside * 2):
        y = LoopedBlock(Captures(captured), LOOPS)(x, mode=mode)
        with pytest.raises(ValueError, match=r"core must get every tensor .* got one of shape \(6,\) from around it"):
            y.sum().backward()
    y = LoopedBlock(Captures(outside), LOOPS)(x, mode="autograd")
    assert torch.autograd.grad(y.sum(), outside)[0].abs().sum() > 0


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def test_a_core_that_writes_into_its_input_is_refused():
    x = torch.randn(3, DIM, requires_grad=True)
    with pytest.raises(RuntimeError, match="core must leave its input as it is, got it changed in place in loop 1"):
        LoopedBlock(nn.Sequential(nn.Identity(), OnceIntact()), LOOPS)(x)


class OnceIntact(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * 2 if self.calls == 1 else x.mul_(2)


def test_arguments_changed_before_backward_are_refused():
    block, mask = stack(), torch.ones(7, 1)
    x = torch.randn(7, DIM, requires_grad=True)
    y = block(x, mask)
    mask.zero_()
    with pytest.raises(RuntimeError, match="arguments must stay as they are until backward, got one changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_parameters_changed_before_backward_are_refused(mode):
    block = stack()
    y = block(torch.randn(7, DIM), mode=mode)
    with torch.no_grad():
        block.core[1].linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="parameters must stay as they are until backward, got one changed in place"):
        y.sum().backward()


def test_states_can_leave_for_the_host():
    """torch's hooks of saved tensors get the carried states."""
    packed = []

    def pack(x):
        packed.append(x)
        return x.clone()

    block, x = stack(torch.float64), torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = block(x)
    assert sum(p.shape == x.shape for p in packed) >= LOOPS
    got = torch.autograd.grad(y.sum(), list(block.parameters()))
    want = torch.autograd.grad(by_hand(block, x, LOOPS)[-1].sum(), list(block.parameters()))
    assert all(rel_err(a, b) < 1e-12 for a, b in zip(got, want))


@pytest.mark.parametrize("core", [nn.Identity(), nn.Dropout(0.0)])
@pytest.mark.parametrize("mode", [*OURS[:2], "autograd"], ids=str)
def test_a_core_that_returns_its_input(core, mode):
    x = torch.randn(3, DIM, requires_grad=True)
    block = LoopedBlock(core, 3)
    states = block.all_states(x, mode=mode)
    assert all(torch.equal(h, x) for h in states)
    sum(h.sum() for h in states).backward()
    assert (x.grad == 3).all()
    twin = LoopedBlock(core, 3, injection="add")
    assert torch.equal(torch.autograd.grad(twin(x, mode=mode).sum(), x)[0], torch.full_like(x, 4.0))


@pytest.mark.parametrize("mode", [*OURS[:2], "autograd"], ids=str)
def test_an_empty_batch(mode):
    x = torch.zeros(0, DIM, dtype=torch.float64, requires_grad=True)
    block = stack(torch.float64, norm=True, injection="gate", check_finite=True)
    block(x, mode=mode).sum().backward()
    assert all((p.grad == 0).all() for p in block.parameters())


class Returned(nn.Module):
    """Hands out a parameter as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(5, DIM))

    def forward(self, h):
        return self.p


@pytest.mark.parametrize("mode", OURS, ids=str)
@pytest.mark.parametrize("options", [{}, {"residual": "euler"}, {"injection": "add", "norm": True}], ids=str)
def test_a_core_that_returns_a_parameter(options, mode):
    """The backward of a loop begins where the parameter's gradient ends."""
    layer, start = Returned(), torch.randn(5, DIM)
    block = LoopedBlock([layer], LOOPS, dim=DIM, **options)
    found, truth = (torch.autograd.grad(block(start, mode=each).sin().sum(), layer.p)[0] for each in (mode, "autograd"))
    assert truth.norm() > 0
    assert rel_err(found, truth.double()) < 1e-6
