"""Where parameters lie in memory, and that they may move between two steps."""

import copy
import pickle

import pytest
import torch
from torch import nn

from effkern.optim import OneSidedShampoo, Shampoo


def adamw_twin(p):
    return nn.Parameter(p.detach().clone().contiguous())


@pytest.mark.parametrize("kind", ["every second", "column", "transposed"])
def test_adamw_in_strided_memory(kind):
    """torch.optim.AdamW on a packed copy is the truth; numbers between those of the parameter are not ours."""
    base = torch.randn(20, 3)
    before = base.clone()
    view = {"every second": base.flatten()[::2], "column": base[:, :1], "transposed": base.t()}[kind]
    p = nn.Parameter(view)
    twin = adamw_twin(p)
    ours = Shampoo([p], lr=0.1, rule="adamw", eps=1e-3, weight_decay=0.1)
    truth = torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)
    for _ in range(3):
        twin.grad = torch.randn(p.shape)
        p.grad = twin.grad.clone()
        ours.step()
        truth.step()
    torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)
    p.detach().zero_()
    view = {"every second": before.flatten()[::2], "column": before[:, :1], "transposed": before.t()}[kind]
    view.zero_()
    assert torch.equal(base, before)


def test_adamw_after_a_change_of_layout():
    p = nn.Parameter(torch.randn(4, 6))
    twin = adamw_twin(p)
    ours, truth = Shampoo([p], lr=0.1, rule="adamw"), torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.95))
    truth.param_groups[0]["weight_decay"] = 0.0
    for t in range(4):
        if t == 2:
            p.data = p.data.t().contiguous().t()
        twin.grad = torch.randn(p.shape)
        p.grad = twin.grad.clone()
        ours.step()
        truth.step()
    torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)


def conv_pair(**options):
    """One run in plain memory; one that starts there and moves to channels-last after two steps."""
    shape = (16, 3, 2, 2)
    stays = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    moves = nn.Parameter(stays.detach().clone())
    return stays, moves, *(Shampoo([p], lr=0.1, grafting="none", **options) for p in (stays, moves))


def one_step(pairs):
    grad = torch.randn(pairs[0][0].shape, dtype=torch.float64)
    for p, optimizer in pairs:
        p.grad = grad.contiguous(memory_format=torch.channels_last) if p.stride(1) == 1 else grad.clone()
        optimizer.step()


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_channels_last_after_the_first_steps(side):
    """Momentum and factors follow; the columns of a right factor are in another order then."""
    stays, moves, first, second = conv_pair(side=side)
    for t in range(4):
        if t == 2:
            moves.data = moves.data.to(memory_format=torch.channels_last)
        one_step([(stays, first), (moves, second)])
    assert moves.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(moves, stays, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("back", [False, True])
def test_states_go_from_one_layout_to_another(back):
    stays, moves, first, second = conv_pair(side="both")
    if back:
        moves.data = moves.data.to(memory_format=torch.channels_last)
    one_step([(stays, first), (moves, second)])
    other = nn.Parameter(moves.detach().clone(memory_format=torch.contiguous_format))
    if not back:
        other.data = other.data.to(memory_format=torch.channels_last)
    third = Shampoo([other], lr=0.1, grafting="none", side="both")
    third.load_state_dict(second.state_dict())
    for _ in range(2):
        one_step([(stays, first), (other, third)])
    torch.testing.assert_close(other, stays, rtol=1e-9, atol=1e-9)


def test_cut_right_factors_stay_in_their_order():
    """Blocks of other columns cannot be made of those that were summed: refused, and nothing is changed."""
    stays, moves, first, second = conv_pair(side="right", block_size=8)
    one_step([(stays, first), (moves, second)])
    other = nn.Parameter(moves.detach().to(memory_format=torch.channels_last))
    third = Shampoo([other], lr=0.1, side="right", block_size=8)
    with pytest.raises(ValueError, match=r"must lie in memory as when its right factors were made, as they are cut"):
        third.load_state_dict(second.state_dict())
    assert not third.state
    moves.data = other.data
    before = moves.detach().clone()
    with pytest.raises(ValueError, match=r"in the order \(0, 1, 2, 3\) of its dimensions, got \(0, 2, 3, 1\)"):
        one_step([(moves, second)])
    assert torch.equal(moves, before)


def test_a_weight_with_gaps_keeps_its_momentum_where_it_is():
    w = nn.Parameter(torch.randn(8, 6)[::2])
    packed = nn.Parameter(w.detach().clone())
    first, second = OneSidedShampoo([w]), OneSidedShampoo([packed])
    places = set()
    for _ in range(3):
        w.grad = torch.randn(4, 6)
        packed.grad = w.grad.clone()
        first.step()
        second.step()
        places.add(first.state[w]["momentum"].data_ptr())
    assert len(places) == 1
    assert torch.equal(w, packed)


def test_groups_and_parameters_may_be_replaced():
    """What is no more in param_groups stays, what has come steps as it would alone."""
    a, b, c = (nn.Parameter(torch.randn(4, 6)) for _ in range(3))
    alone = [nn.Parameter(p.detach().clone()) for p in (b, c)]
    optimizer = OneSidedShampoo([{"params": [a]}, {"params": [b], "side": "right"}])
    others = [OneSidedShampoo([alone[0]], side="right"), OneSidedShampoo([alone[1]])]

    def step(*optimizers):
        grad = torch.randn(4, 6)
        for p in (a, b, c, *alone):
            p.grad = grad.clone()
        for o in optimizers:
            o.step()

    step(optimizer, others[0])
    kept = a.detach().clone()
    optimizer.param_groups.pop(0)
    step(optimizer, others[0])
    assert torch.equal(a, kept)
    assert torch.equal(b, alone[0])
    optimizer.param_groups[0] |= {"params": [c], "side": "auto"}
    step(optimizer, others[1])
    assert torch.equal(b, alone[0])
    assert torch.equal(c, alone[1])


def test_model_in_another_dtype():
    """float32 state becomes float64 with the weights: from there on the steps are those of float64."""
    model = nn.Linear(5, 4)
    optimizer = Shampoo(model.parameters(), lr=0.1)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.randn(p.shape, dtype=dtype)
        optimizer.step()
        assert all((p != q).all() for p, q in zip(model.parameters(), before))
    assert {v.dtype for k, v in optimizer.state[model.weight].items() if k != "step"} == {torch.float64}
    assert {v.dtype for k, v in optimizer.state[model.bias].items() if k != "step"} == {torch.float64}


def test_frozen_parameters_take_no_memory():
    frozen, live = nn.Parameter(torch.randn(30, 30), requires_grad=False), nn.Parameter(torch.randn(4, 6))
    optimizer = OneSidedShampoo([frozen, live])
    twin = nn.Parameter(frozen.detach().clone())
    other = OneSidedShampoo([twin])
    live.grad = torch.randn(4, 6)
    optimizer.step()
    assert frozen not in optimizer.state
    frozen.requires_grad_(True)
    frozen.grad = torch.randn(30, 30)
    twin.grad = frozen.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(frozen, twin)


@pytest.mark.parametrize("options", [{}, {"grafting": "none"}, {"grafting": "adam"}, {"rule": "adamw"}], ids=str)
def test_autograd_sees_that_weights_changed(options):
    w, x = nn.Parameter(torch.randn(4, 6)), torch.randn(3, 4, requires_grad=True)
    optimizer = Shampoo([w], **options)
    out = (x @ w).square().sum()
    out.backward(retain_graph=True)
    optimizer.step()
    versions = [t._version for k, t in optimizer.state[w].items() if k != "step"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    optimizer.step()
    assert all(t._version > v for t, v in zip((t for k, t in optimizer.state[w].items() if k != "step"), versions))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_share_nothing(duplicate):
    model = nn.Linear(5, 4)
    optimizer = Shampoo(model.parameters(), lr=0.1)
    take_step(model, optimizer, 0)
    other_model, other = duplicate((model, optimizer))
    take_step(model, optimizer, 1)
    assert not torch.equal(model.weight, other_model.weight)
    take_step(other_model, other, 1)
    assert torch.equal(model.weight, other_model.weight)
    assert torch.equal(model.bias, other_model.bias)


def take_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
