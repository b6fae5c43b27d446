"""How LoopedBlock executes: same bits, memory, random states, float32 sums, hooks, odd uses of a graph."""

import copy

import pytest
import torch
from torch import nn

from effkern.nn import LoopedBlock, Truncated
from tests.nn.looped_cases import DIM, LOOPS, OURS, AliveBytes, Layer, by_hand, results, stack
from tests.numerics import assert_as_good_as_eager, rel_err


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"injection": "gate", "norm": True}, {"residual": "laurel", "rank": 2}], ids=str
)
def test_recompute_is_full_storage_bit_for_bit(options, dtype, autocast, dropout):
    """The same kernels on the same numbers, dropout masks included; layers that are run twice as well."""
    block, x = stack(dtype, dropout=dropout, **options), torch.randn(7, DIM, dtype=dtype)
    full = results(block, x, "full", 1, autocast)
    for mode in OURS[1:]:
        again = results(block, x, mode, 1, autocast)
        assert all(torch.equal(a, b) for a, b in zip(full, again, strict=True)), mode
    if dropout == 0:
        truth = results(copy.deepcopy(block).double(), x.double(), "autograd")
        for fast, eager, want in zip(full, results(block, x, "autograd", 1, autocast), truth):
            # The roundings of a few small products, by luck fewer in one of them.
            assert_as_good_as_eager(fast, eager, want.double(), factor=3.0, ulps=4.0)


@pytest.mark.parametrize("mode", [*OURS, "autograd"], ids=str)
def test_dropout_draws_as_a_loop_by_hand(mode):
    """Forward takes the same masks, backward draws none that others would miss."""
    block, x = stack(torch.float64, dropout=0.5), torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    want = by_hand(block, x, LOOPS)[-1]
    after = torch.rand(1)
    leaves = [x, *block.parameters()]
    expected = torch.autograd.grad(want.sum(), leaves)
    torch.manual_seed(3)
    got = block(x, mode=mode)
    state = torch.get_rng_state()
    found = torch.autograd.grad(got.sum(), leaves)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.rand(1), after)
    for a, b in zip([got, *found], [want, *expected]):
        assert rel_err(a.detach(), b.detach()) < 1e-12


@pytest.mark.parametrize(
    ("mode", "forwards", "backwards"),
    [("full", 1, 0), ("recompute", 1, 1), ("recompute_layer", 1, 2), ("autograd", 1, 0)],
)
def test_how_often_the_core_runs(mode, forwards, backwards):
    block, x = stack(), torch.randn(7, DIM, requires_grad=True)
    y = block(x, mode=mode)
    assert [layer.calls for layer in block.core] == [forwards * LOOPS] * 2
    y.sum().backward()
    assert [layer.calls for layer in block.core] == [(forwards + backwards) * LOOPS] * 2


def test_truncated_runs_the_last_loops_again_only():
    block, x = stack(), torch.randn(7, DIM, requires_grad=True)
    block(x, mode=Truncated(3)).sum().backward()
    assert block.core[0].calls == LOOPS + 3
    assert x.grad is None
    assert block.core[0].linear.weight.grad is not None


def peak(block, x, **options):
    """Bytes of the forward and backward pass at their peak, gradients of leaves not counted."""

    def step():
        y = block(x, **options)
        y.backward(torch.ones_like(y))
        for p in [x, *block.parameters()]:
            p.grad = None

    step()
    with AliveBytes() as alive:
        step()
    return alive.peak


class Wide(nn.Module):
    """Saves `width` states, and needs few besides."""

    def __init__(self, dim, width):
        super().__init__()
        self.scales = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x):
        y = x
        for scale in self.scales.unbind():
            y = torch.sin(y * 1.01) * scale + x
        return y


def test_memory_is_that_of_the_table():
    """L S + k M, L k M, L S + k S + M, t S + k M: each mode's slope in L or k is that of its formula, in states."""
    x = torch.randn(64, 1024, requires_grad=True)
    state = x.numel() * 4

    def states(mode, loops, layers):
        block = LoopedBlock([Wide(1024, 8) for _ in range(layers)], loops)
        return peak(block, x, mode=mode, loops=loops) / state

    # What one layer saves: the slope in k of a single loop.
    saved = states("full", 1, 4) - states("full", 1, 3)
    assert 15 < saved < 25
    assert (states("full", 6, 2) - states("full", 2, 2)) / 4 == pytest.approx(2 * saved, rel=0.05)
    for mode in ("recompute", "recompute_layer"):
        assert (states(mode, 22, 2) - states(mode, 2, 2)) / 20 == pytest.approx(1, rel=0.02)
    assert states("recompute", 2, 6) - states("recompute", 2, 2) == pytest.approx(4 * saved, rel=0.05)
    assert states("recompute_layer", 2, 6) - states("recompute_layer", 2, 2) == pytest.approx(4, rel=0.05)
    assert states(Truncated(2), 30, 2) == pytest.approx(states(Truncated(2), 3, 2), abs=0.01)
    # The whole of it: the loops' states, and k layers with what their backward needs, as torch runs them once.
    for loops, layers in ((16, 2), (32, 4)):
        once = peak(nn.Sequential(*[Wide(1024, 8) for _ in range(layers)]), x) / state
        assert layers * saved < once < layers * saved + 6
        assert loops - 1 + once <= states("recompute", loops, layers) <= 1.05 * (loops + once)


class Bf16Step(nn.Module):
    """One product: the bfloat16 gradient of its weight has one rounding a visit."""

    def __init__(self, dim, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim, dtype=dtype) * dim**-0.5)

    def forward(self, x):
        return x + nn.functional.linear(nn.functional.silu(x), self.weight)


@pytest.mark.parametrize("mode", ["full", "recompute"])
def test_error_of_a_shared_gradient_does_not_grow_with_the_loops(mode):
    """Against the float32 sum of the same addends' exact values, which are those of a core with a weight per loop."""
    torch.manual_seed(0)
    dim, errors, plain = 64, [], []
    for loops in (4, 8, 32):
        block = LoopedBlock(Bf16Step(dim, torch.bfloat16), loops, residual="euler")
        x = torch.randn(256, dim).bfloat16()
        # Addends in float64 from the very states of the run in bfloat16.
        states = [x, *block.all_states(x, mode="recompute")]
        cotangents = [torch.randn(256, dim).bfloat16()]
        truth = torch.zeros(dim, dim, dtype=torch.float64)
        for t in reversed(range(loops)):
            h = states[t].detach().requires_grad_()
            y = block.core(h)
            y = h + (y - h) / loops
            truth += silu_product(block.core, h, cotangents[-1], 1 / loops)
            cotangents.append(torch.autograd.grad(y, h, cotangents[-1])[0])
        for kind, found in ((mode, errors), ("autograd", plain)):
            y = block(x, mode=kind)
            block.core.weight.grad = None
            y.backward(cotangents[0])
            found.append(rel_err(block.core.weight.grad, truth))
    # One rounding of the sum and one of each addend, whatever L is, and those of the addends average.
    assert max(errors) < 0.0030
    assert max(errors) < 1.25 * min(errors)
    assert plain[-1] > 2 * errors[-1]
    assert plain[-1] > 1.5 * plain[0]


def silu_product(core, h, grad, share):
    """The weight's gradient of one visit, in float64."""
    return (grad.double() * share).T @ nn.functional.silu(h.detach()).double()


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_main_grad(mode):
    """The float32 sums go to p.main_grad, and add up over calls; p.grad is left alone."""
    block = stack(torch.bfloat16, main_grad=True, norm=True)
    twin = copy.deepcopy(block).float()
    twin.main_grad = False
    x = torch.randn(7, DIM).bfloat16()
    for count in (1, 2):
        block(x, mode=mode).float().sum().backward()
        twin(x.float(), mode="autograd").sum().backward()
        for p, q in zip(block.core.parameters(), twin.core.parameters()):
            assert p.grad is None
            assert p.main_grad.dtype == torch.float32
            assert rel_err(p.main_grad, q.grad.double()) < 0.05 * count
    # The norm's weight is not of the core, its gradient comes as usual.
    assert block.norm.weight.grad is not None
    narrow = stack(torch.bfloat16, main_grad=True)
    narrow.core.load_state_dict(block.core.state_dict())
    assert not torch.equal(
        block.core[0].linear.weight.main_grad, block.core[0].linear.weight.main_grad.bfloat16().float()
    )


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_hooks_of_a_parameter_fire_once(mode):
    block, x = stack(), torch.randn(7, DIM)
    fired: dict[int, int] = {}
    for p in block.parameters():
        p.register_post_accumulate_grad_hook(lambda p: fired.update({id(p): fired.get(id(p), 0) + 1}))
    block(x, mode=mode).sum().backward()
    assert fired == {id(p): 1 for p in block.parameters()}


@pytest.mark.parametrize("mode", [*OURS, "autograd"], ids=str)
def test_a_tensor_hook_sees_the_whole_gradient_once(mode):
    """One that changes the gradient changes it once, and is there for the next call."""
    block, x = stack(torch.float64), torch.randn(7, DIM, dtype=torch.float64)
    weight, seen = block.core[1].linear.weight, []
    (want,) = torch.autograd.grad(by_hand(block, x, LOOPS)[-1].sum(), weight)
    weight.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    for count in (1, 2):
        block.zero_grad()
        block(x, mode=mode).sum().backward()
        assert len(seen) == count
        assert rel_err(seen[-1], want) < 1e-12
        assert rel_err(weight.grad, 2 * want) < 1e-12


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_frozen_parameters(mode):
    block, x = stack(torch.float64), torch.randn(7, DIM, dtype=torch.float64)
    block.core[0].linear.weight.requires_grad_(False)
    leaves = [p for p in block.parameters() if p.requires_grad]
    got = torch.autograd.grad(block(x, mode=mode).square().sum(), leaves)
    want = torch.autograd.grad(by_hand(block, x, LOOPS)[-1].square().sum(), leaves)
    assert all(rel_err(a, b) < 1e-12 for a, b in zip(got, want))
    # Adapters before a frozen core: the input's gradient alone.
    block.requires_grad_(False)
    x.requires_grad_()
    got = torch.autograd.grad(block(x, mode=mode).square().sum(), x)
    assert rel_err(got[0], torch.autograd.grad(by_hand(block, x, LOOPS)[-1].square().sum(), x)[0]) < 1e-12


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = Layer(), Layer()

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("mode", [*OURS[:2], "autograd"], ids=str)
def test_a_parameter_that_takes_no_part(mode):
    block = LoopedBlock(Unused(), 3)
    block(torch.randn(7, DIM, dtype=torch.float64), mode=mode).sum().backward()
    assert block.core.used.linear.weight.grad is not None
    assert block.core.unused.linear.weight.grad is None


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_twice_in_one_graph_and_weights_tied_outside(mode):
    block = stack(torch.float64, injection="add")
    x = torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)
    tied = block.core[0].linear.weight
    leaves = [x, *block.parameters()]

    def whole(apply):
        return nn.functional.linear(apply(torch.sin(apply(x))), tied).square().sum()

    got = torch.autograd.grad(whole(lambda z: block(z, mode=mode)), leaves)
    want = torch.autograd.grad(whole(lambda z: by_hand(block, z, LOOPS)[-1]), leaves)
    assert all(rel_err(a, b) < 1e-11 for a, b in zip(got, want))


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_a_second_backward(mode):
    block, x = stack(dropout=0.3), torch.randn(7, DIM, requires_grad=True)
    y = block(x, mode=mode).square().sum()
    leaves = [x, *block.parameters()]
    first = torch.autograd.grad(y, leaves, retain_graph=True)
    second = torch.autograd.grad(y, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves)


def test_full_storage_is_given_back_while_backward_goes():
    """Without retain_graph no loop's graph outlives its turn."""
    x = torch.randn(64, 1024, requires_grad=True)
    block = LoopedBlock(Wide(1024, 8), 8)
    y = block(x, mode="full")
    with AliveBytes() as alive:
        y.sum().backward()
    assert alive.peak < 12 * x.numel() * 4


@pytest.mark.parametrize("mode", OURS, ids=str)
def test_a_second_derivative_is_refused(mode):
    block, x = stack(), torch.randn(7, DIM, requires_grad=True)
    with pytest.raises(NotImplementedError, match='create_graph=True is not covered, mode="autograd" is'):
        torch.autograd.grad(block(x, mode=mode).sum(), x, create_graph=True)


def test_second_derivatives_by_autograd():
    block = stack(torch.float32, injection="gate", norm=True, residual="laurel", rank=2)
    x = torch.randn(2, DIM, requires_grad=True)
    (first,) = torch.autograd.grad(block(x, mode="autograd").sin().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), list(block.core.parameters()))[0].abs().sum() > 0
    block = stack(torch.float64, injection="add")
    x = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: block(x, mode="autograd"), x)
