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
    """By the name of the one that does; a finite one ends the count, an absent one does not count."""
    good, bad = weight(6), weight(3)
    optimizer = Shampoo([("good", good), ("bad", bad)], max_failures=2)
    with pytest.warns(RuntimeWarning, match="gradient of bad is not finite"):
        step(optimizer, torch.randn(6), torch.full((3,), math.nan))
    step(optimizer, torch.randn(6), torch.randn(3))
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precondition_frequency": 0}, "precondition_frequency must be at least 1, got 0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"grafting": "foo"}, "grafting must be one of"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"side": "both"}, "side, .* of group 1 must stay as they were"),
    ],
    ids=str,
)
def test_options_set_later(change, message):
    """Refused before any parameter of any group has moved or counted a step."""
    a, b = weight(4, 6), weight(4, 6)
    optimizer = Shampoo([{"params": [a]}, {"params": [b]}])
    step(optimizer, torch.randn(4, 6), torch.randn(4, 6))
    optimizer.param_groups[1].update(change)
    before = a.detach().clone(), {k: v.clone() for k, v in optimizer.state[a].items()}
    with pytest.raises(ValueError, match=message):
        step(optimizer, torch.randn(4, 6), torch.randn(4, 6))
    assert torch.equal(a, before[0])
    assert all(torch.equal(v, optimizer.state[a][k]) for k, v in before[1].items())


def test_a_weight_that_is_no_matrix_stops_all_groups():
    a, b = weight(4, 6), nn.Parameter(torch.randn(4, 6, 5)[:, ::2])
    optimizer = Shampoo([{"params": [a]}, {"params": [b]}])
    before = a.detach().clone()
    with pytest.raises(ValueError, match="must lie in memory so that"):
        step(optimizer, torch.randn(4, 6), torch.randn(4, 3, 5))
    assert torch.equal(a, before)
    optimizer.load_state_dict(optimizer.state_dict())


def test_failures_of_one_group_leave_the_others_their_step():
    a, b = weight(4, 6), weight(4, 6)
    optimizer = Shampoo([{"params": [a]}, {"params": [b]}], max_failures=1)
    before = b.detach().clone()
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="all else has taken this step"):
        step(optimizer, torch.full((4, 6), math.nan), torch.randn(4, 6))
    assert (b != before).all()


@pytest.mark.parametrize("grafting", ["rms", "none", "adam"])
def test_numbers_of_other_kinds(grafting):
    """NumPy's numbers and a learning rate of shape [1, 1] step as Python's numbers."""
    np = pytest.importorskip("numpy")
    found = []
    for lr, kind in ((0.25, float), (np.float32(0.25), np.float32), (torch.tensor([[0.25]]), np.float64)):
        torch.manual_seed(0)
        ps = weight(4, 6), weight(6)
        options = {"weight_decay": kind(0.5), "ridge": kind(2**-10), "betas": (kind(0.5), kind(0.75)), "eps": kind(0.5)}
        optimizer = Shampoo(ps, lr=lr, grafting=grafting, **options)
        for _ in range(2):
            step(optimizer, torch.randn(4, 6), torch.randn(6))
        found.append(ps)
    for ps in found[1:]:
        for p, q in zip(ps, found[0]):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have their parameter's dtype")
@pytest.mark.parametrize("options", [{}, {"grafting": "adam"}, {"rule": "adamw"}], ids=str)
def test_gradients_of_other_dtypes(options):
    """float32 and float64 gradients of bfloat16 weights beside bfloat16 ones: each as it steps alone."""
    kinds = (torch.bfloat16, torch.float32, torch.float64)
    ws = [weight(4, 6, dtype=torch.bfloat16) for _ in kinds]
    copies = [nn.Parameter(w.detach().clone()) for w in ws]
    together, alone = Shampoo(ws, lr=0.1, **options), [Shampoo([c], lr=0.1, **options) for c in copies]
    for p, dtype in zip(ws, kinds):
        p.grad_dtype = dtype
    for c in copies:
        c.grad_dtype = torch.float32
    for _ in range(2):
        grads = [torch.randn(4, 6).bfloat16().to(dtype) for dtype in kinds]
        step(together, *grads)
        for optimizer, grad in zip(alone, grads):
            step(optimizer, grad.float())
    assert all(torch.equal(w, c) for w, c in zip(ws, copies))
