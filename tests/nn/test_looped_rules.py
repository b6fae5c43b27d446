"""Rules that are known before a call, types of arguments, float64 throughout, and where truncation holds."""

import pytest
import torch
from torch import nn

from effkern.nn import Implicit, LoopedBlock, PoissonLognormalLoops, Truncated, UniformLoops
from effkern.nn.looped import GraphedLoops
from tests.nn.looped_cases import DIM, Layer, by_hand, randomize
from tests.nn.looped_recorder import RecordingRecorder
from tests.numerics import rel_err

LOOPS = 4


@pytest.mark.parametrize(
    ("loops", "options", "message"),
    [
        (5, {"max_loops": 4}, "loops must be at most max_loops=4, got 5"),
        (UniformLoops(1, 5), {"max_loops": 4}, "loops of the sampler must be at most max_loops=4, got 5"),
        (
            PoissonLognormalLoops(2, limit=5),
            {"max_loops": 4},
            "loops of the sampler must be at most max_loops=4, got 5",
        ),
        (PoissonLognormalLoops(2), {"max_loops": 4}, "loops of the sampler must be at most max_loops=4, got inf"),
        (2, {"mode": Truncated(3)}, "mode must have at most the block's 2 loops, got Truncated"),
        (2, {"norm_eps": 0.0}, r"norm_eps must be a number above 0, got 0\.0"),
        (2, {"norm_eps": float("nan")}, "norm_eps must be a number above 0, got nan"),
    ],
)
def test_what_no_call_could_meet_is_refused_at_once(loops, options, message):
    with pytest.raises(ValueError, match="LoopedBlock: " + message):
        LoopedBlock(nn.Identity(), loops, **options)


def test_limits_that_fit():
    LoopedBlock(nn.Identity(), UniformLoops(1, 4), max_loops=4, mode=Truncated(4))
    LoopedBlock(nn.Identity(), PoissonLognormalLoops(4, limit=4), max_loops=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "rms"}, "norm must be True, False or a module, got 'rms'"),
        ({"norm_eps": "1e-6"}, "norm_eps must be a number, got '1e-6'"),
    ],
)
def test_types_of_the_block(options, message):
    with pytest.raises(TypeError, match="LoopedBlock: " + message):
        LoopedBlock(nn.Identity(), 2, dim=DIM, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_steps": 0.5}, r"time_steps must be a sequence of numbers, got 0\.5"),
        ({"time_steps": ["a", "b"]}, "time_steps must be a sequence of numbers"),
        ({"time_steps": [None, 1.0]}, "time_steps must be a sequence of numbers"),
        ({"per_layer": [1, 2]}, "per_layer must be a dict of names and values, got list"),
        (
            {"per_layer": {"scale": 3.0}},
            r"per_layer\['scale'\] must be values\[t\]\[i\], of loops and layers, got float",
        ),
        ({"per_layer": {"scale": [1.0, 2.0]}}, r"per_layer\['scale'\] must be values\[t\]\[i\]"),
        ({"per_layer": {"scale": torch.ones(2)}}, r"per_layer\['scale'\] must be .* got a tensor of shape \(2,\)"),
        ({"state": 0.0}, "state must be a tensor of a floating dtype, got float"),
        (
            {"state": torch.zeros(3, DIM, dtype=torch.long)},
            r"state must be a tensor of a floating dtype, got torch\.int64",
        ),
    ],
)
def test_types_of_a_call(options, message):
    block = LoopedBlock([Layer()], 2, residual="euler")
    with pytest.raises(TypeError, match="LoopedBlock: " + message):
        block(torch.zeros(3, DIM, dtype=torch.float64), **options)


@pytest.mark.parametrize("scalars", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (1, {"injection": "convex"}),
        (1, {"conditioning": "sinusoidal"}),
        (1, {"conditioning": "time"}),
        (2, {"layer_scalars": "increment", "max_loops": LOOPS}),
    ],
    ids=str,
)
def test_a_block_in_float64_computes_in_float64(layers, options, scalars):
    """No number on the way is rounded to float32: the formulas in float64, from the same parameters."""
    torch.manual_seed(0)
    core = [Layer() for _ in range(layers)]
    block = randomize(LoopedBlock(core, LOOPS, dim=DIM, dtype=torch.float64, **options), 2.0)
    if block.layer_scalars.table is not None:
        # 1 - a has more digits than float32, where a has not been made of 1 and something.
        nn.init.normal_(block.layer_scalars.table)
    block = block.double() if scalars == torch.float64 else block
    x, z = torch.randn(3, DIM, dtype=torch.float64), None
    conditioning = block.conditioning
    if conditioning.kind == "none":
        assert rel_err(block(x), by_hand(block, x, LOOPS)[-1].detach()) < 1e-13
        return
    half = torch.exp(torch.arange(32, dtype=torch.float64) * (-torch.tensor(1e4, dtype=torch.float64).log() / 32))

    def waves(values):
        angles = torch.tensor(values, dtype=torch.float64)[:, None] * half
        return torch.cat([angles.cos(), angles.sin()], -1)

    if conditioning.kind == "sinusoidal":
        rows = conditioning.outer(waves([0.0, 1.0, 2.0, 3.0]))
    else:
        both = torch.cat([waves([0.0, 250.0, 500.0, 750.0]), waves([250.0] * 4)], -1)
        rows = conditioning.outer(nn.functional.silu(conditioning.inner(both)))
    z = x
    for row in rows:
        z = block.core[0](z + row)
    assert rel_err(block(x), z.detach()) < 1e-13


def test_step_by_step_of_drawn_loops():
    """A loop's time and length are those of the sampler's loops in evaluation, all of one size."""
    block = randomize(
        LoopedBlock(
            Layer(), UniformLoops(1, LOOPS), dim=DIM, dtype=torch.float64, conditioning="time", residual="euler"
        )
    )
    x = torch.randn(3, DIM, dtype=torch.float64)
    at = block.start(x)
    for _ in range(LOOPS):
        at = block.advance(at)
    assert rel_err(at.state.detach(), block.eval()(x).detach()) < 1e-13
    with pytest.raises(ValueError, match="loops must be more than the 4 done, got 4"):
        block.advance(at)


class Doubling(nn.Module):
    def forward(self, x):
        return torch.where(x.abs() > 3, torch.inf, 2 * x)


def test_step_by_step_looks_at_every_state():
    block = LoopedBlock(Doubling(), 6, check_finite=True)
    at = block.start(torch.ones(2, 2))
    at = block.advance(block.advance(at))
    with pytest.raises(FloatingPointError, match=r"not after loop 2 \(counted from 0, of 3\)"):
        block.advance(at)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("mode", [Truncated(2), Truncated(2, recompute=False)], ids=str)
def test_states_without_gradient_of_a_core_that_returns_its_input(mode, sharded, monkeypatch):
    block, x = LoopedBlock(nn.Identity(), LOOPS), torch.randn(3, DIM, requires_grad=True)
    monkeypatch.setattr("effkern.nn.looped.block.has_fsdp_inside", lambda core: sharded)
    states = block.all_states(x, mode=mode)
    assert [h.requires_grad for h in states][:2] == [False, False]
    assert all(torch.equal(h, x) for h in states)


@pytest.mark.parametrize("mode", ["full", "recompute", "recompute_layer", "autograd"])
@pytest.mark.parametrize("given", [False, True])
def test_a_samplers_with_gradient_holds_in_every_mode(given, mode):
    """In training, also where a call gives its loops; a mode of the call that truncates itself goes first."""
    sampler = UniformLoops(LOOPS, LOOPS, with_gradient=2)
    block = randomize(LoopedBlock([Layer(), Layer()], sampler, dim=DIM, dtype=torch.float64, injection="add"))
    x = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    call = {"loops": LOOPS} if given else {"step": 0}

    def grads(**options):
        return torch.autograd.grad(block(x, **call, **options).square().sum(), leaves)

    truncated, got = grads(mode=Truncated(2)), grads(mode=mode)
    assert all(rel_err(a, b) < 1e-12 for a, b in zip(got, truncated))
    assert [h.requires_grad for h in block.all_states(x, mode=mode, **call)] == [False, False, True, True]
    whole = torch.autograd.grad(by_hand(block, x, LOOPS)[-1].square().sum(), leaves)
    assert all(rel_err(a, b) < 1e-12 for a, b in zip(grads(mode=Truncated(LOOPS)), whole))
    block.eval()
    assert all(rel_err(a, b) < 1e-12 for a, b in zip(grads(mode=mode), whole))
    assert rel_err(got[0], whole[0]) > 1e-3


@pytest.mark.parametrize(
    ("loops", "options", "message"),
    [
        (LOOPS, {"mode": Truncated(2)}, "mode 'recompute', got Truncated"),
        (LOOPS, {"mode": Implicit()}, "mode 'recompute', got Implicit"),
        (LOOPS, {"mode": "autograd"}, "mode 'recompute', got 'autograd'"),
        (UniformLoops(1, 4, with_gradient=2), {}, "no with_gradient of its sampler, got 2"),
    ],
)
def test_graphs_refuse_what_they_do_not_do(loops, options, message):
    with pytest.raises(NotImplementedError, match="GraphedLoops: block must have " + message):
        GraphedLoops(LoopedBlock(Layer(), loops, **options), RecordingRecorder())
    block = LoopedBlock(Layer(), LOOPS)
    graphed = GraphedLoops(block, RecordingRecorder())
    block.loops, block.mode = loops, options.get("mode", "recompute")
    with pytest.raises(NotImplementedError, match="GraphedLoops: block must have " + message):
        graphed(torch.zeros(3, DIM, dtype=torch.float64), loops=LOOPS)


def test_graphs_see_what_trains():
    """Another recording for another set of parameters that train, and for eval()."""
    block = randomize(LoopedBlock([Layer(dropout=0.5)], LOOPS)).eval()
    recorder = RecordingRecorder()
    graphed, x = GraphedLoops(block, recorder), torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    graphed(x).sum().backward()
    block.core[0].linear.bias.requires_grad_(False)
    block.zero_grad()
    graphed(x).sum().backward()
    assert block.core[0].linear.bias.grad is None
    block.core[0].linear.requires_grad_(True)
    block.core[0].linear.weight.requires_grad_(False)
    graphed(x).sum().backward()
    (want,) = torch.autograd.grad(block(x).sum(), block.core[0].linear.bias)
    assert rel_err(block.core[0].linear.bias.grad, want) < 1e-12
    assert recorder.recordings == 6
    block.train()
    with pytest.raises(NotImplementedError, match="core must draw no random numbers"):
        graphed(x)
