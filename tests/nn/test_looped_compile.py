"""torch.compile on the core: no number of loops compiles anything; and the block inside a compiled model."""

import pytest
import torch
from torch import nn

from effkern.nn import LoopedBlock, Truncated
from tests.nn.looped_cases import DIM, randomize
from tests.numerics import rel_err


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend that runs what it is given, and counts how often it is asked."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


class Core(nn.Module):
    """As Layer, without its counter, which a compiler would take for a reason to compile again."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear, self.dropout = nn.Linear(DIM, DIM, dtype=torch.float64), nn.Dropout(dropout)

    def forward(self, z):
        return z + self.dropout(torch.tanh(self.linear(z)))


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("mode", ["full", "recompute", "recompute_layer", Truncated(1)], ids=str)
def test_no_number_of_loops_compiles_anything(mode, layered):
    """One graph for training, one for what runs without a gradient; and the numbers of the core as it is."""
    if mode == "recompute_layer" and not layered:
        pytest.skip("needs layers")
    core, counter = Core(), Counter()
    compiled = torch.compile(core, backend=counter, fullgraph=True)
    block = LoopedBlock([compiled] if layered else compiled, 3, injection="add")
    plain = LoopedBlock([core], 3, injection="add")
    x, after_first = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True), None
    for loops in (3, 1, 2, 7, 12, 33):
        found = []
        for made in (block, plain):
            y = made(x, loops=loops, mode=mode)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(core.parameters()))])
        for a, b in zip(*found):
            assert rel_err(a.detach(), b.detach()) < 1e-12
        with torch.no_grad():
            block(x, loops=loops)
        after_first = counter.graphs if after_first is None else after_first
        assert counter.graphs == after_first <= 2


def test_dropout_in_a_compiled_core_is_replayed():
    compiled = torch.compile(Core(dropout=0.5), backend="aot_eager", fullgraph=True)
    block = LoopedBlock(compiled, 4)
    x, found = torch.randn(5, DIM, dtype=torch.float64), []
    for mode in ("full", "recompute"):
        torch.manual_seed(1)
        y = block(x, mode=mode)
        found.append([y.detach(), *torch.autograd.grad(y.sum(), list(block.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*found))


class Model(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.embed, self.head = nn.Linear(3, DIM, dtype=torch.float64), nn.Linear(DIM, 2, dtype=torch.float64)
        options = {"dim": DIM, "injection": "gate", "norm": True, "dtype": torch.float64}
        self.block = randomize(LoopedBlock([Core()], 3, mode=mode, **options))

    def forward(self, x):
        return self.head(self.block(self.embed(x)))


@pytest.mark.parametrize("mode", ["full", "recompute", "autograd"])
def test_inside_a_compiled_model(mode):
    """As one graph, unrolled; recompute through torch's checkpoint."""
    model = Model(mode)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, found = torch.randn(5, 3, dtype=torch.float64), []
    for call in (compiled, model):
        y = call(x)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    for a, b in zip(*found):
        assert rel_err(a, b.double()) < 1e-6
