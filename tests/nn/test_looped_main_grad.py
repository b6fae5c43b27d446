"""What main_grad gets and refuses."""

import pytest
import torch
from torch import nn

from effkern.nn import Implicit, LoopedBlock
from effkern.nn.looped import GraphedLoops
from tests.nn.looped_cases import DIM, Layer
from tests.nn.looped_recorder import RecordingRecorder
from tests.numerics import rel_err

KINDS = ["full", "recompute", "graphed", "implicit"]


def make(kind, dtype=torch.float32, **options):
    given = {"main_grad": True, "injection": "add", "dim": DIM, "dtype": dtype, **options}
    block = LoopedBlock([Layer(dtype=dtype)], 3, **given)
    if kind == "graphed":
        return block, GraphedLoops(block, RecordingRecorder())
    mode = Implicit(steps=3) if kind == "implicit" else kind
    return block, lambda x: block(x, mode=mode)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_others_alone_adds_nothing(kind):
    """torch.autograd.grad names what it asks for; a leaf in its list, or backward(), asks for the parameter."""
    block, call = make(kind)
    x, weight = torch.randn(3, DIM, requires_grad=True), block.core[0].linear.weight
    torch.autograd.grad(call(x).sum(), x)
    assert getattr(weight, "main_grad", None) is None
    call(x).sum().backward()
    once = weight.main_grad.clone()
    assert once.abs().sum() > 0
    torch.autograd.grad(call(x).sum(), [x, weight], allow_unused=True)
    assert rel_err(weight.main_grad, 2 * once.double()) < 1e-5
    call(x).sum().backward(inputs=[weight])
    assert rel_err(weight.main_grad, 3 * once.double()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_does_not_fit_is_refused(kind):
    block, call = make(kind, torch.bfloat16)
    x, weight = torch.randn(3, DIM).bfloat16(), block.core[0].linear.weight
    for wrong in (torch.zeros_like(weight), torch.zeros(DIM, 1), None, [0.0]):
        weight.main_grad = wrong
        if wrong is None:
            call(x).float().sum().backward()
            continue
        rule = r"LoopedBlock: main_grad of a parameter must be torch\.float32 of shape \(6, 6\) on cpu, got"
        with pytest.raises(ValueError, match=rule):
            call(x)
    assert weight.grad is None


def test_where_torchs_own_graph_runs_it_is_refused(monkeypatch):
    """Its gradients would go to p.grad."""
    block, x = LoopedBlock([Layer()], 3, main_grad=True), torch.randn(3, DIM, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="LoopedBlock: main_grad needs an eager call"):
        block(x, mode="autograd")
    with pytest.raises(NotImplementedError, match="LoopedBlock: main_grad needs an eager call"):
        block.advance(block.start(x))
    with torch.no_grad():
        assert torch.equal(block(x, mode="autograd"), block.advance(block.advance(block.advance(block.start(x)))).state)
    monkeypatch.setattr("effkern.nn.looped.block.has_fsdp_inside", lambda core: True)
    for mode in ("recompute", "autograd"):
        with pytest.raises(NotImplementedError, match="LoopedBlock: main_grad needs an eager call"):
            block(x, mode=mode)


def test_the_norm_is_the_cores_where_it_is_a_module():
    block, call = make("recompute", norm=nn.LayerNorm(DIM))
    call(torch.randn(3, DIM)).square().sum().backward()
    assert block.norm.weight.grad is None
    assert block.norm.weight.main_grad.abs().sum() > 0
    block, call = make("recompute", norm=True)
    call(torch.randn(3, DIM)).square().sum().backward()
    assert block.norm.weight.grad.abs().sum() > 0
    assert getattr(block.norm.weight, "main_grad", None) is None
