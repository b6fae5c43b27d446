"""Every option of Shampoo against the step written out once more in float64."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from effkern.optim import OneSidedShampoo, Shampoo
from effkern.optim.shampoo import blocks, describe, parameter_groups
from effkern.optim.shampoo.options import last_root_step, root_is_due
from tests.optim.shampoo_literal import Literal, LiteralAdamW

DEFAULTS = {
    "lr": 0.05, "betas": (0.9, 0.8), "side": "auto", "exponents": None, "accumulation": "ema", "bias_correction": True,
    "weight_decay": 0.1, "grafting": "rms", "graft_scale": 0.2, "ridge": 1e-4, "pseudo_inverse": None,
    "adamw_betas": (0.8, 0.9), "block_size": 1024, "precondition_frequency": 1, "start_step": 1, "eps": 1e-8,
}  # fmt: skip
# Square, wide, tall, a convolution, vectors and a scalar.
SHAPES = [(5, 5), (4, 9), (4, 9), (9, 4), (6, 3, 2, 2), (7,), (1, 8), ()]

OPTIONS = {
    "default": {},
    "left": {"side": "left"},
    "right": {"side": "right"},
    "both": {"side": "both"},
    "no grafting": {"grafting": "none"},
    "no grafting, both": {"grafting": "none", "side": "both"},
    "free exponents": {"grafting": "none", "side": "both", "exponents": (0.3, 0.1)},
    "one exponent": {"grafting": "none", "side": "right", "exponents": 0.25},
    "sum": {"grafting": "none", "accumulation": "sum"},
    "weighted": {"grafting": "none", "accumulation": "weighted", "side": "left"},
    "kl": {"grafting": "none", "accumulation": "kl", "side": "both", "ridge": 1e-2},
    "kl, grafted": {"accumulation": "kl", "side": "both", "ridge": 1e-2, "precondition_frequency": 2},
    "no correction": {"grafting": "none", "bias_correction": False},
    "no momentum": {"grafting": "none", "betas": (0.0, 0.8)},
    "no momentum, rms": {"betas": (0.0, 0.8)},
    "sgd": {"grafting": "sgd"},
    "adagrad": {"grafting": "adagrad", "side": "both"},
    "rmsprop": {"grafting": "rmsprop"},
    "adam": {"grafting": "adam", "block_size": 4},
    "blocks": {"block_size": 3},
    "blocks, both": {"block_size": 4, "side": "both", "grafting": "none"},
    "frequency": {"precondition_frequency": 3, "grafting": "none"},
    "schedule": {"precondition_frequency": ((1, 1), (3, 2)), "grafting": "none"},
    "start": {"start_step": 3},
    "start, none": {"start_step": 3, "grafting": "none"},
    "start, sgd": {"start_step": 3, "grafting": "sgd", "precondition_frequency": 2},
    "start, adam": {"start_step": 3, "grafting": "adam"},
    "pseudo-inverse": {"pseudo_inverse": 1e-3, "ridge": 0.0},
    "no decay": {"weight_decay": 0.0},
    "scale": {"graft_scale": 0.7},
}


def options(name):
    return {**DEFAULTS, **OPTIONS[name]}


def make(given, dtype=torch.float64, **more):
    """Parameters, the optimizer over them, and the literal twins."""
    weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    with warnings_of(given):
        optimizer = Shampoo(weights, **given, root_method="eigh", **more)
    twins = [(Literal if blocks.is_matrix(w.shape) else LiteralAdamW)(w.detach(), given) for w in weights]
    return weights, optimizer, twins


def warnings_of(given):
    if given["exponents"] is not None:
        return pytest.warns(UserWarning, match=r"exponents sum to [0-9.]+, not 0.5")
    return contextlib.nullcontext()


def run(weights, optimizer, twins, steps, absent=()):
    for t in range(steps):
        for i, (w, twin) in enumerate(zip(weights, twins)):
            grad = torch.randn(w.shape, dtype=torch.float64)
            if (t, i) in absent:
                w.grad = None
                continue
            w.grad = grad.to(w.dtype)
            twin.step(w.grad)
        optimizer.step()


def compare(weights, twins, bound):
    for w, twin in zip(weights, twins):
        expected = twin.w.reshape(w.shape)
        error = (w.detach().double() - expected).norm() / expected.norm()
        assert error <= bound, f"{tuple(w.shape)}: {error:.1e}"


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_options_in_float64(name, impl):
    weights, optimizer, twins = make(options(name), impl=impl)
    run(weights, optimizer, twins, 5)
    compare(weights, twins, 1e-10)


@pytest.mark.parametrize("name", ["default", "both", "no grafting", "kl", "adam", "blocks, both", "start"])
def test_float32(name):
    """Measured 2e-7 to 3e-6: float32 roots of factors with a ridge of 1e-4."""
    weights, optimizer, twins = make(options(name), torch.float32)
    run(weights, optimizer, twins, 5)
    compare(weights, twins, 1e-5)


def test_bfloat16_weights_have_float32_state():
    """Each step rounds a weight once: half an ulp, 2^-9, of what it is."""
    given = {**options("default"), "weight_decay": 0.0}
    weights, optimizer, twins = make(given, torch.bfloat16)
    run(weights, optimizer, twins, 4)
    compare(weights, twins, 4 * 2**-9)
    state = optimizer.state[weights[1]]
    assert {k: v.dtype for k, v in state.items()} == dict.fromkeys(state, torch.float32)
    # The factor does not meet the weights: it is that of the gradients to float32.
    factor = twins[1].state[0]["L"]
    assert (state["left"][0].double() - factor).norm() <= 1e-6 * factor.norm()


def test_dtypes_may_be_mixed():
    """Parameters of one shape and three dtypes: each steps as it would alone."""
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    w = [nn.Parameter(torch.randn(4, 6).to(dtype)) for dtype in kinds]
    copies = [nn.Parameter(p.detach().clone()) for p in w]
    together, alone = Shampoo(w, lr=0.1), [Shampoo([c], lr=0.1) for c in copies]
    for _ in range(3):
        for p, c in zip(w, copies):
            p.grad = c.grad = torch.randn(4, 6).to(p.dtype)
        for o in (together, *alone):
            o.step()
    assert all(torch.equal(p, c) for p, c in zip(w, copies))


def test_absent_gradients():
    """A parameter without gradient stays, with its state and its count of steps; the others of its batch go on."""
    weights, optimizer, twins = make(options("no grafting"))
    run(weights, optimizer, twins, 6, absent={(0, 0), (1, 2), (2, 1), (3, 1), (3, 2), (4, 4), (5, 5)})
    compare(weights, twins, 1e-10)


def test_strided_and_channels_last():
    """Gradients of other layouts, a transposed weight, and a channels-last convolution: the same numbers."""
    given = {**options("both"), "block_size": 4}
    plain = nn.Parameter(torch.randn(6, 5).double())
    turned = nn.Parameter(plain.detach().t().contiguous().t())
    conv = nn.Parameter(torch.randn(6, 3, 2, 2).double())
    last = nn.Parameter(conv.detach().to(memory_format=torch.channels_last))
    first, second = Shampoo([plain, conv], **given), Shampoo([turned, last], **{**given, "side": "left"})
    third = Shampoo(
        [nn.Parameter(plain.detach().clone()), nn.Parameter(conv.detach().clone())], **{**given, "side": "left"}
    )
    for _ in range(3):
        grads = torch.randn(12, 5).double()[::2], torch.randn(6, 2, 3, 2).double().transpose(1, 2)
        for optimizer in (first, second, third):
            for p, grad in zip(optimizer.param_groups[0]["params"], grads):
                p.grad = grad
            optimizer.step()
    same, conv_same = third.param_groups[0]["params"]
    assert not grads[0].is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(turned.detach(), same.detach(), rtol=1e-12, atol=1e-12)
    # The columns of a convolution stand in another order, which the left factor does not see.
    torch.testing.assert_close(last.detach(), conv_same.detach(), rtol=1e-9, atol=1e-9)
    assert (plain - same).abs().max() > 1e-3


def test_weight_that_is_no_matrix_in_memory():
    weight = nn.Parameter(torch.randn(4, 6, 5)[:, ::2])
    weight.grad = torch.randn(4, 3, 5)
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"parameter 0 of group 0, shape \(4, 3, 5\), must lie in memory so that"):
        Shampoo([weight]).step()
    assert torch.equal(weight, before)


def test_learning_rate_as_tensor_and_as_number():
    a, b = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    rate = torch.tensor(0.1)
    first, second = (Shampoo([p], lr=lr, grafting="none", weight_decay=0.5) for p, lr in ((a, rate), (b, 0.1)))
    for value in (0.1, 0.03):
        rate.fill_(value)
        second.param_groups[0]["lr"] = value
        a.grad = b.grad = torch.randn(3, 4)
        first.step()
        second.step()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert (a - 1).abs().max() > 1e-2


def test_schedulers_may_change_what_they_change():
    """OneCycleLR writes lr and the first beta, which holds for momentum and its correction from then on."""
    w = nn.Parameter(torch.randn(4, 3).double())
    given = {**options("no grafting"), "betas": (0.9, 0.8)}
    optimizer, twin = Shampoo([w], **given, root_method="eigh"), Literal(w.detach(), given)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=6)
    for _ in range(5):
        w.grad = torch.randn(4, 3).double()
        twin.o = {**given, **{name: optimizer.param_groups[0][name] for name in ("lr", "betas")}}
        twin.step(w.grad)
        optimizer.step()
        schedule.step()
    compare([w], [twin], 1e-10)


def test_closure_sees_gradients():
    w = nn.Parameter(torch.randn(3, 3))
    optimizer = Shampoo([w])

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True)


def test_groups_and_names():
    """A group added later with options of its own steps as an optimizer of its own would."""
    w = [nn.Parameter(torch.randn(4, 6).double()) for _ in range(2)]
    copies = [nn.Parameter(p.detach().clone()) for p in w]
    optimizer = Shampoo([("first", w[0])], lr=0.1)
    optimizer.add_param_group({"params": [("second", w[1])], "side": "both", "grafting": "none", "lr": 0.01})
    alone = Shampoo([copies[0]], lr=0.1), Shampoo([copies[1]], lr=0.01, side="both", grafting="none")
    for _ in range(3):
        for p, c in zip(w, copies):
            p.grad = c.grad = torch.randn(4, 6).double()
        for o in (optimizer, *alone):
            o.step()
    assert torch.equal(w[0], copies[0])
    assert torch.equal(w[1], copies[1])
    text = describe(optimizer)
    assert "4x6 Shampoo left ^-0.5, 1 block: 1 (first)" in text
    assert "4x6 Shampoo left ^-0.25 right ^-0.25, 1 block: 1 (second)" in text


def test_batches_equal_single_parameters():
    """Stacked blocks give what each parameter gives alone, to the bit."""
    shapes = [(8, 8), (8, 8), (8, 12), (12, 8), (8, 8)]
    w = [nn.Parameter(torch.randn(s)) for s in shapes]
    copies = [nn.Parameter(p.detach().clone()) for p in w]
    together, alone = OneSidedShampoo(w), [OneSidedShampoo([c]) for c in copies]
    for _ in range(3):
        for p, c in zip(w, copies):
            p.grad = c.grad = torch.randn(p.shape)
        for o in (together, *alone):
            o.step()
    assert all(torch.equal(p, c) for p, c in zip(w, copies))


def test_rotation():
    """W -> Q W: the left-sided update turns with it."""
    turn = torch.linalg.qr(torch.randn(6, 6).double())[0]
    w = nn.Parameter(torch.randn(6, 9).double())
    v = nn.Parameter(turn @ w.detach())
    first, second = (Shampoo([p], side="left", root_method="eigh", ridge=1e-4) for p in (w, v))
    for _ in range(4):
        w.grad = torch.randn(6, 9).double()
        v.grad = turn @ w.grad
        first.step()
        second.step()
    torch.testing.assert_close(turn @ w.detach(), v.detach(), rtol=1e-9, atol=1e-9)


def test_schedule_of_roots():
    due = [t for t in range(1, 41) if root_is_due(((1, 1), (5, 4), (20, 10)), 3, t)]
    assert due == [3, 4, 8, 12, 16, 20, 30, 40]
    assert [t for t in range(1, 12) if root_is_due(5, 1, t)] == [1, 5, 10]


@pytest.mark.parametrize("start", [1, 3, 6, 24])
@pytest.mark.parametrize("frequency", [1, 7, ((1, 1), (5, 4), (20, 10)), ((1, 10), (6, 3), (7, 50))])
def test_last_root_step(frequency, start):
    last = 0
    for t in range(1, 120):
        last = t if root_is_due(frequency, start, t) else last
        assert last_root_step(frequency, start, t) == last


def test_blocks_cover_and_do_not_overlap():
    for rows, cols, limit, left, right in [(10, 7, 4, True, True), (1025, 3, 1024, True, False), (8, 8, 8, True, True)]:
        seen = torch.zeros(rows, cols)
        for cuts in blocks.split(rows, cols, limit, left, right).values():
            for cut in cuts:
                blocks.take(seen, cut).add_(1)
                assert cut.m <= limit or not left
                assert cut.n <= limit or not right
        assert torch.equal(seen, torch.ones(rows, cols))
    assert sorted(blocks.split(1025, 3, 1024, True, False)) == [(512, 3), (513, 3)]


def test_parameter_groups_follow_the_rule():
    model = nn.Sequential(
        nn.Embedding(9, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Conv1d(6, 4, 3), nn.Linear(6, 9, bias=False)
    )
    model[4].weight = model[0].weight
    groups = parameter_groups(model, weight_decay=0.1, adamw=("3.weight",), shampoo_options={"lr": 2.0})
    found = {(g["rule"], g["weight_decay"]): [name for name, _ in g["params"]] for g in groups}
    assert found == {
        ("shampoo", 0.1): ["1.weight"],
        ("adamw", 0.1): ["3.weight"],
        ("adamw", 0.0): ["0.weight", "1.bias", "2.weight", "2.bias", "3.bias"],
    }
    assert groups[0]["lr"] == 2.0
    OneSidedShampoo(groups)


def test_state_is_momentum_and_two_factors():
    """Numbers of state: m n + 2 p^2 one-sided, none of them hidden in the stacks."""
    w = nn.Parameter(torch.randn(8, 20))
    w.grad = torch.randn(8, 20)
    optimizer = OneSidedShampoo([w])
    optimizer.step()
    sizes = {k: v.numel() for k, v in optimizer.state[w].items()}
    assert sizes == {"step": 1, "momentum": 160, "left": 64, "left_root": 64}
    ((_, _, plan),) = optimizer._plans.values()
    shared = optimizer.state[w]["left"].untyped_storage().data_ptr()
    assert [b.factor.untyped_storage().data_ptr() for b in plan.buckets] == [shared]


def test_copies_go_on_alone():
    """deepcopy of model and optimizer: the same steps after it, nothing shared."""
    model = nn.Linear(5, 4)
    optimizer = Shampoo(model.parameters(), lr=0.1)
    step_once(model, optimizer, 0)
    other_model, other = copy.deepcopy((model, optimizer))
    for seed in (1, 2):
        step_once(model, optimizer, seed)
    before = model.weight.detach().clone()
    for seed in (1, 2):
        step_once(other_model, other, seed)
    assert torch.equal(before, other_model.weight)
    assert torch.equal(before, model.weight)


def step_once(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
