"""Steps that fail in part: what stays, what goes on, what is told."""

import math

import pytest
import torch
from torch import nn

from effkern.optim import Shampoo
from tests.optim.test_shampoo_guards import step, weight


def test_adamw_gradients_that_are_not_finite():
    """AdamW's parameters of a group stay, weights, state and count of steps, and the matrices go on; afterwards all is
    as if the step had not been."""
    model = nn.ModuleDict({"bias": nn.ParameterList([weight(6), weight(3)]), "layer": nn.Linear(6, 4, bias=False)})
    twin = [nn.Parameter(p.detach().clone()) for p in model["bias"]]
    optimizer, truth = Shampoo(model.named_parameters(), lr=0.1), Shampoo(twin, lr=0.1)
    for t in range(4):
        grads = [torch.randn(6), torch.randn(3)]
        bad = t == 1
        before = model["layer"].weight.detach().clone()
        if not bad:
            step(truth, *grads)
        else:
            grads[0][2] = math.inf
        if bad:
            with pytest.warns(RuntimeWarning, match=r"gradient of bias.0 is not finite; what AdamW steps in its group"):
                step(optimizer, *grads, torch.randn(4, 6))
        else:
            step(optimizer, *grads, torch.randn(4, 6))
        assert (model["layer"].weight != before).all()
        assert all(torch.equal(p, q) for p, q in zip(model["bias"], twin))
    for p, q in zip(model["bias"], twin):
        assert all(torch.equal(value, truth.state[q][key]) for key, value in optimizer.state[p].items())


def test_adamw_gradients_that_stay_infinite_stop_the_run():
    """By the name of the one that does; absent gradients do not count."""
    good, bad = weight(6), weight(3)
    optimizer = Shampoo([("good", good), ("bad", bad)], max_failures=2)
    with pytest.warns(RuntimeWarning, match="gradient of bad is not finite"):
        step(optimizer, torch.randn(6), torch.full((3,), math.nan))
    step(optimizer, torch.randn(6), None)
    with pytest.raises(RuntimeError, match=r"AdamW's gradient of bad must be finite, got 2 failures in a row"):
        step(optimizer, torch.randn(6), torch.full((3,), math.nan))


def test_updates_that_are_not_finite_are_not_laid_on_the_gradient():
    w = weight(4, 6)
    optimizer = Shampoo([("w", w)], lr=0.1)
    step(optimizer, torch.randn(4, 6))
    optimizer.state[w]["momentum"][0, 0] = math.inf
    before = w.detach().clone()
    with pytest.warns(RuntimeWarning) as told:
        step(optimizer, torch.randn(4, 6))
    assert [str(t.message) for t in told] == [
        "Shampoo: update of w is not finite, for its momentum or root; momentum and weight of that block stay as they "
        "were"
    ]
    assert torch.equal(w, before)
