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


CASES = [
    {"grafting": "none"},
    {"grafting": "none", "side": "both", "bias_correction": False},
    {"grafting": "none", "side": "both", "accumulation": "kl"},
    {"grafting": "rms", "block_size": 3, "side": "both"},
]


@pytest.mark.parametrize("first", [0.0, math.nan])
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:Shampoo. gradient")
def test_roots_of_factors_that_come_late(options, first):
    """No gradient yet at the step of the roots (a zero-initialised factor makes its partner's zero): the root is taken
    with the first gradient, as one with a root at every step takes it, and kept; also through a saved state."""
    seldom, loaded, often, other = (weight(4, 6, dtype=torch.float64) for _ in range(4))
    with torch.no_grad():
        often.copy_(seldom)
        loaded.copy_(seldom)
    optimizer = Shampoo([other, seldom], precondition_frequency=50, **options)
    truth = Shampoo([often], precondition_frequency=1, **options)
    grads = [torch.full((4, 6), first).double(), *torch.randn(2, 4, 6, dtype=torch.float64)]
    step(optimizer, torch.randn(4, 6).double(), grads[0])
    step(truth, grads[0])
    resumed = Shampoo([nn.Parameter(other.detach().clone()), loaded], precondition_frequency=50, **options)
    resumed.load_state_dict(optimizer.state_dict())
    for t in (1, 2):
        roots = {k: v.clone() for k, v in optimizer.state[seldom].items() if "root" in k}
        mine = torch.randn(4, 6).double()
        step(optimizer, mine, grads[t])
        step(resumed, mine, grads[t])
        step(truth, grads[t])
        if t == 1:
            torch.testing.assert_close(seldom, often, rtol=1e-9, atol=1e-12)
            assert all(not torch.equal(v, optimizer.state[seldom][k]) for k, v in roots.items())
    assert all(torch.equal(v, optimizer.state[seldom][k]) for k, v in roots.items())
    assert torch.equal(loaded, seldom)


def test_float64_roots_are_those_of_eigh():
    a, b = weight(5, 8, dtype=torch.float64), weight(5, 8, dtype=torch.float64)
    with torch.no_grad():
        b.copy_(a)
    first, second = Shampoo([a]), Shampoo([b], root_method="eigh")
    for _ in range(2):
        grad = torch.randn(5, 8).double()
        step(first, grad)
        step(second, grad)
    assert torch.equal(a, b)
