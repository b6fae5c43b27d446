"""LoopedBlock's parts against the loops written out by hand, in float64."""

import copy
import itertools

import pytest
import torch
from torch import nn

from effkern.nn import LoopedBlock, PoissonLognormalLoops, Truncated, UniformLoops
from effkern.nn.looped import parts
from tests.nn.looped_cases import DIM, Layer, by_hand, randomize
from tests.numerics import rel_err

LOOPS = 4
MODES = ["full", "recompute", "autograd", Truncated(LOOPS), Truncated(LOOPS, recompute=False)]
PARTS = {
    "plain": {},
    "add": {"injection": "add"},
    "linear": {"injection": "linear", "init": "zeros"},
    "gate": {"injection": "gate", "init": "learned"},
    "convex": {"injection": "convex", "init": "zeros"},
    "laurel": {"residual": "laurel", "rank": 2},
    "laurel-wide": {"residual": "laurel", "rank": 0, "per_channel": True, "injection": "add"},
    "euler": {"residual": "euler"},
    "euler-substeps": {"residual": "euler", "substeps": 7, "injection": "gate"},
    "table": {"conditioning": "table", "max_loops": 6},
    "sinusoidal": {"conditioning": "sinusoidal", "injection": "linear"},
    "time": {"conditioning": "time", "injection": "add"},
    "norm": {"norm": True},
    "norm-add": {"norm": True, "injection": "add", "conditioning": "table", "max_loops": 4},
    "everything": {"norm": True, "injection": "gate", "conditioning": "time", "residual": "laurel", "rank": 3},
}


def block_of(core=None, loops=LOOPS, **options) -> LoopedBlock:
    core = Layer() if core is None else core
    return randomize(LoopedBlock(core, loops, **{"dim": DIM, "dtype": torch.float64, **options}))


def grads_of(y, leaves):
    weight = torch.sin(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))
    return torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)


def compare(got, want, tolerance=1e-13):
    for a, b in zip(got, want):
        assert (a is None) == (b is None)
        if a is not None:
            assert rel_err(a, b) < tolerance


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_is_the_unrolled_stack_with_tied_weights(name, mode):
    """Output and every gradient; scalars of whole tensors, and so their gradients, are float32."""
    block = block_of(**PARTS[name])
    x = torch.randn(3, 5, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    want = by_hand(block, x, LOOPS)[-1]
    got = block(x, mode=mode)
    assert rel_err(got, want.detach()) < 1e-13
    compare(grads_of(got, leaves), grads_of(want, leaves), 1e-6 if name in ("gate", "convex", "everything") else 1e-12)


@pytest.mark.parametrize("mode", [*MODES, "recompute_layer"], ids=str)
@pytest.mark.parametrize("kind", parts.SCALARS)
def test_layers_with_their_scalars(kind, mode):
    layers = [Layer(), Layer(), Layer()]
    block = block_of(layers, layer_scalars=kind, max_loops=5, injection="add")
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(2, 5, 1, dtype=torch.float64, requires_grad=True)
    leaves = [x, mask, *block.parameters()]
    want, got = by_hand(block, x, LOOPS, mask)[-1], block(x, mask, mode=mode)
    assert rel_err(got, want.detach()) < 1e-13
    compare(grads_of(got, leaves), grads_of(want, leaves), 1e-6 if kind != "none" else 1e-12)


@pytest.mark.parametrize("loops", [1, 2, 7])
def test_any_number_of_loops(loops):
    block = block_of(injection="add", norm=True)
    x = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    for given in (block(x, loops=loops), block(x, loops=loops, mode="full")):
        want = by_hand(block, x, loops)[-1]
        assert rel_err(given, want.detach()) < 1e-13
        compare(grads_of(given, leaves), grads_of(want, leaves), 1e-12)


def test_starts_without_effect():
    """At the start every optional part leaves the plain loop, so that it can be added to a trained model."""
    core, x = Layer(), torch.randn(3, DIM, dtype=torch.float64)
    plain = LoopedBlock(core, LOOPS)(x)
    for options in (*({"conditioning": kind} for kind in parts.CONDITIONINGS), {"residual": "laurel", "rank": 2}):
        made = LoopedBlock(core, LOOPS, dim=DIM, max_loops=LOOPS, dtype=torch.float64, **options)
        assert torch.equal(made(x), plain), options
    for kind in ("increment", "stream", "argument"):
        made = LoopedBlock([core], LOOPS, max_loops=LOOPS, layer_scalars=kind)
        torch.testing.assert_close(made(x), plain, rtol=1e-12, atol=1e-12)
    assert torch.equal(LoopedBlock(core, 1, residual="euler", substeps=1)(x), LoopedBlock(core, 1)(x))


def test_truncated_is_the_detach_reference():
    block = block_of(injection="gate", conditioning="table", max_loops=LOOPS, norm=True)
    x = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    for t, recompute in itertools.product((1, 2, 3), (True, False)):
        with torch.no_grad():
            before = by_hand(block, x, LOOPS)[LOOPS - t - 1]
        want = by_hand(block, x, t, state=before, first=LOOPS - t)[-1]
        got = block(x, mode=Truncated(t, recompute=recompute))
        assert rel_err(got, want.detach()) < 1e-13
        compare(grads_of(got, leaves), grads_of(want, leaves), 1e-6)
        assert got.requires_grad


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("injection", ["none", "add"])
def test_all_states_and_losses_on_them(injection, mode):
    block = block_of(injection=injection, norm=True)
    x = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    want, got = by_hand(block, x, LOOPS), block.all_states(x, mode=mode)
    assert len(got) == LOOPS
    # One state takes no part in the loss.
    loss = [sum((i + 1) * h.square().sum() for i, h in enumerate(states) if i != 2) for states in (got, want)]
    for a, b in zip(got, want):
        assert rel_err(a, b.detach()) < 1e-13
    compare(*(torch.autograd.grad(value, leaves) for value in loss), 1e-12)
    first = block.all_states(x, mode=mode)[0]
    compare(torch.autograd.grad(first.sum(), leaves), torch.autograd.grad(by_hand(block, x, 1)[0].sum(), leaves), 1e-12)


def test_states_before_a_truncated_gradient_have_none():
    block, x = block_of(), torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    for recompute in (True, False):
        states = block.all_states(x, mode=Truncated(2, recompute=recompute))
        assert [h.requires_grad for h in states] == [False, False, True, True]
        want = by_hand(block, x, LOOPS)
        assert all(rel_err(a, b.detach()) < 1e-13 for a, b in zip(states, want))


def test_step_by_step_is_the_same():
    block = block_of(injection="gate", conditioning="table", max_loops=LOOPS, residual="laurel", rank=2, norm=True)
    x = torch.randn(3, 5, DIM, dtype=torch.float64)
    at, states = block.start(x), block.all_states(x)
    for t in range(LOOPS):
        before = at.state
        at = block.advance(at)
        assert rel_err(at.state, states[t].detach()) < 1e-13
        moved = (at.state - before).norm(dim=-1) / at.state.norm(dim=-1)
        torch.testing.assert_close(at.change.double(), moved, rtol=1e-6, atol=0)
        assert at.loop == t + 1
    few = block.advance(block.start(x).rows([2, 0]))
    assert rel_err(few.state, states[0][[2, 0]].detach()) < 1e-13
    with pytest.raises(ValueError, match="loops must be more than the 4 done, got 4"):
        block.advance(at)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_arguments_reach_the_core_and_get_gradients(mode):
    """Nested, tied, with and without gradient."""
    block = block_of([Layer(), Layer()])
    x = torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True), torch.randn(3, DIM, dtype=torch.float64)
    scale = torch.randn(LOOPS, 2, DIM, dtype=torch.float64, requires_grad=True)
    got = block(x, x, rope=(cos, sin), per_layer={"scale": scale}, mode=mode)
    h = x
    for t in range(LOOPS):
        for i, layer in enumerate(block.core):
            h = layer(h, x, rope=(cos, sin), scale=scale[t, i])
    leaves = [x, cos, scale, *block.parameters()]
    assert rel_err(got, h.detach()) < 1e-13
    compare(grads_of(got, leaves), grads_of(h, leaves), 1e-12)


def test_per_layer_takes_lists_of_anything():
    block = block_of([Layer(), Layer()])
    x = torch.randn(2, 3, DIM, dtype=torch.float64)
    scale = torch.randn(LOOPS, 2, dtype=torch.float64)
    assert torch.equal(block(x, per_layer={"scale": scale}), block(x, per_layer={"scale": scale.tolist()}))


class Counting(nn.Module):
    def forward(self, x, depth):
        self.seen = [*getattr(self, "seen", []), depth]
        return x + depth


def test_the_core_may_know_its_loop():
    block = LoopedBlock(Counting(), 3, loop_argument="depth")
    assert (block(torch.zeros(2, 2)) == 3).all()
    assert block.core.seen == [0, 1, 2]


def test_norm_of_the_model():
    """A module of the user's, shared with what follows."""
    norm = nn.LayerNorm(DIM, dtype=torch.float64)
    block = block_of(norm=norm, injection="add")
    x = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    for mode in MODES:
        z, got = x, block(x, mode=mode)
        for _ in range(LOOPS):
            z = norm(block.core(z + x))
        assert rel_err(got, z.detach()) < 1e-13
        compare(grads_of(norm(got), leaves), grads_of(norm(z), leaves), 1e-12)


def test_noise_is_truncated_normal():
    x = torch.zeros(1000, 50)
    state = LoopedBlock(nn.Identity(), 1, init="noise").start(x).state
    std = (2 / 5) ** 0.5
    assert state.abs().max() <= 3 * std
    # The cut at three takes 1.3 % of the variance.
    assert abs(state.std().item() / (std * 0.9866) - 1) < 0.01
    assert not torch.equal(state, LoopedBlock(nn.Identity(), 1, init="noise").start(x).state)


def test_time_steps():
    block = block_of(conditioning="time", residual="euler")
    x, steps = torch.randn(3, DIM, dtype=torch.float64), [0.1, 0.2, 0.3, 0.4]
    want = by_hand(block, x, 4, time_steps=steps)[-1].detach()
    assert rel_err(block(x, time_steps=steps), want) < 1e-13
    assert rel_err(block(x, time_steps=[0.25] * 4), block(x).detach()) < 1e-6
    assert rel_err(block(x), want) > 1e-3


def test_the_state_keeps_the_dtype_of_x():
    block = LoopedBlock(nn.Linear(DIM, DIM), 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(2, DIM)).dtype == torch.float32


def test_scalars_stay_float32():
    block = LoopedBlock([Layer()], 3, dim=DIM, injection="gate", residual="laurel", rank=2, layer_scalars="stream",
                        max_loops=3, dtype=torch.float32).bfloat16()  # fmt: skip
    for name, p in block.named_parameters():
        narrow = "core" in name or "low_rank" in name
        assert p.dtype == (torch.bfloat16 if narrow else torch.float32), name
    x = torch.randn(2, DIM).bfloat16()
    block(x).float().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in block.parameters())


def test_parameters_fill_themselves_from_a_generator():
    made = []
    for _ in range(2):
        block = LoopedBlock([nn.Identity()], 3, dim=DIM, injection="linear", residual="laurel", rank=2, norm=True,
                            conditioning="time", init="learned", layer_scalars="increment", max_loops=3)  # fmt: skip
        for module in block.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.fill(torch.Generator().manual_seed(5))
        made.append(list(block.parameters()))
    assert len(made[0]) > 8
    assert all(torch.equal(a, b) for a, b in zip(*made))


def test_no_gradient_no_graph():
    block, x = block_of(injection="add"), torch.randn(3, DIM, dtype=torch.float64)
    with torch.no_grad():
        quiet = block(x)
    assert not quiet.requires_grad
    with torch.inference_mode():
        assert torch.equal(block(x), quiet)
    frozen = block_of()
    frozen.requires_grad_(False)
    assert not frozen(x).requires_grad
    assert torch.equal(block(x), quiet)


def test_copies_and_state_dicts():
    block = block_of([Layer()], injection="linear", conditioning="table", max_loops=4, layer_scalars="stream")
    twin = block_of([Layer()], injection="linear", conditioning="table", max_loops=4, layer_scalars="stream")
    x = torch.randn(3, DIM, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    twin.load_state_dict(block.state_dict())
    assert torch.equal(twin(x), block(x))


def test_drawn_loops():
    core = Counting()
    block = LoopedBlock(core, UniformLoops(2, 6), loop_argument="depth", seed=3)
    drawn = [block.draw_loops(step) for step in range(20)]
    x = torch.zeros(2, 2)
    assert [block(x, step=step)[0, 0].item() for step in range(20)] == [n * (n - 1) / 2 for n in drawn]
    assert len(set(drawn)) == 5
    assert block.eval()(x)[0, 0] == 15
    assert block(x, loops=2)[0, 0] == 1
    with pytest.raises(ValueError, match="step must be given in training, as loops are drawn from it, got None"):
        block.train()(x)
    with pytest.raises(ValueError, match="loops must be a sampler to be drawn, got 3"):
        LoopedBlock(core, 3).draw_loops(0)


def test_drawn_loops_with_a_truncated_gradient():
    """Huginn's: all drawn loops run, the last k carry the gradient; fewer than k all do."""
    block = block_of(loops=PoissonLognormalLoops(4, with_gradient=3))
    x = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    counts = set()
    for step in range(12):
        loops = block.draw_loops(step)
        counts.add(loops)
        leaves = list(block.parameters())
        want = block(x, loops=loops, mode=Truncated(min(3, loops)))
        compare(grads_of(block(x, step=step), leaves), grads_of(want, leaves), 1e-15)
    assert min(counts) < 3 < max(counts)
