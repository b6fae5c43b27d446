"""What LoopedBlock refuses, and what it says: states that are not finite, cores, calls, options."""

import pytest
import torch
from torch import nn

from effkern.nn import LoopedBlock, Truncated
from tests.nn.looped_cases import DIM

LOOPS = 4
MODES = ["full", "recompute", "autograd", Truncated(LOOPS), Truncated(LOOPS, recompute=False)]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def explodes(x):
    return torch.where(x.abs() > 7.5, torch.inf, 2 * x)


class Exploding(nn.Module):
    def forward(self, x):
        return explodes(x)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_state_that_is_not_finite(mode):
    x = torch.ones(3, DIM, requires_grad=True)
    block = LoopedBlock(Exploding(), 6, check_finite=True)
    with pytest.raises(FloatingPointError, match=r"a value that is not after loop 3 \(counted from 0, of 4\)"):
        block(x, loops=4, mode=Truncated(4) if isinstance(mode, Truncated) else mode)
    assert block(x, loops=3, mode="full").isfinite().all()
    with pytest.raises(FloatingPointError, match="after loop 0"):
        block(x * torch.nan, loops=4)
    assert not LoopedBlock(Exploding(), 6)(x).isfinite().any()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_errors_of_the_core(mode):
    x = torch.randn(3, DIM, requires_grad=True)
    with pytest.raises(TypeError, match="LoopedBlock: core must return one tensor, got a tuple of 2"):
        LoopedBlock(Pair(), 4)(x, mode=mode)
    with pytest.raises(ValueError, match=r"LoopedBlock: core must keep the shape \(3, 6\), got \(3, 5\)"):
        LoopedBlock(nn.Linear(DIM, 5), 4)(x, mode=mode)
    with pytest.raises(TypeError, match=r"LoopedBlock: core\[1\] must return one tensor, got a tuple of 2"):
        LoopedBlock([nn.Identity(), Pair()], 4)(x, mode=mode)


def test_errors_of_the_call():
    block, x = LoopedBlock(nn.Identity(), 4, dim=DIM), torch.zeros(3, DIM)
    for loops in (0, -1):
        with pytest.raises(ValueError, match=f"LoopedBlock: loops must be at least 1, got {loops}"):
            block(x, loops=loops)
    for loops in (2.0, True, "2"):
        with pytest.raises(TypeError, match="LoopedBlock: loops must be a whole number or a sampler, got"):
            block(x, loops=loops)
    with pytest.raises(ValueError, match=r"Truncated\.loops must be at most the loops of the call, 4, got 5"):
        block(x, mode=Truncated(5))
    with pytest.raises(ValueError, match=r"mode must be one of .*got 'reversible'"):
        block(x, mode="reversible")
    with pytest.raises(ValueError, match="mode must come with a list of layers as core, got 'recompute_layer'"):
        block(x, mode="recompute_layer")
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., D=6\), got \(3, 5\)"):
        block(torch.zeros(3, 5))
    with pytest.raises(TypeError, match=r"x must be a tensor of a floating dtype, got torch\.int64"):
        block(torch.zeros(3, DIM, dtype=torch.long))
    with pytest.raises(ValueError, match=r"state must have x's shape \(3, 6\), got \(1, 6\)"):
        block(x, state=torch.zeros(1, DIM))
    with pytest.raises(ValueError, match="loops must be at most max_loops=3, got 4"):
        LoopedBlock([nn.Identity()], 3, max_loops=3, layer_scalars="increment")(x, loops=4)
    with pytest.raises(ValueError, match='time_steps must come with conditioning="time" or residual="euler"'):
        block(x, time_steps=[0.25] * 4)
    euler = LoopedBlock(nn.Identity(), 2, residual="euler")
    for steps, rule in (([1.0], "have one entry"), ([2.0, -1.0], "be positive"), ([0.3, 0.3], "have the sum 1")):
        with pytest.raises(ValueError, match=f"time_steps must {rule}"):
            euler(x, time_steps=steps)
    with pytest.raises(ValueError, match=r"per_layer\['scale'\] must have 4 loops, got 3"):
        block(x, per_layer={"scale": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match=r"per_layer\['scale'\]\[0\] must have 1 layers, got 2"):
        block(x, per_layer={"scale": torch.zeros(4, 2)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": []}, "core must have at least one layer"),
        ({"loops": 0}, "loops must be at least 1, got 0"),
        ({"mode": "fast"}, "mode must be one of .*got 'fast'"),
        ({"mode": "recompute_layer"}, "mode must come with a list of layers as core"),
        ({"init": "ones"}, "init must be one of .*got 'ones'"),
        ({"injection": "mul"}, "injection must be one of .*got 'mul'"),
        ({"residual": "rw"}, "residual must be one of .*got 'rw'"),
        ({"conditioning": "index"}, "conditioning must be one of .*got 'index'"),
        ({"layer_scalars": "all"}, "layer_scalars must be one of .*got 'all'"),
        ({"injection": "gate"}, "dim must be given for this injection, got None"),
        ({"residual": "laurel", "dim": 4, "rank": 5}, r"rank must lie in \[0, D=4\], got 5"),
        ({"conditioning": "table", "dim": 4}, "max_loops must be given for this conditioning, got None"),
        ({"layer_scalars": "stream", "max_loops": 3}, "core must be a list of layers for layer_scalars"),
        ({"substeps": 3}, 'substeps must come with residual="euler", got 3'),
        ({"residual": "euler", "substeps": 0}, "substeps must be at least 1, got 0"),
        ({"norm": True}, "dim must be given for this norm, got None"),
    ],
)
def test_construction_errors(options, message):
    given = {"core": nn.Identity(), "loops": 3, **options}
    with pytest.raises(ValueError, match="LoopedBlock: " + message):
        LoopedBlock(given.pop("core"), given.pop("loops"), **given)


def test_construction_type_errors():
    with pytest.raises(TypeError, match="LoopedBlock: core must be a module or a list of layers, got function"):
        LoopedBlock(explodes, 3)
    with pytest.raises(ValueError, match="Truncated: loops must be a whole number of at least 1, got 0"):
        Truncated(0)
