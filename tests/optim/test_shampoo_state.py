"""States of Shampoo: saved, loaded, refused."""

import io
import re

import pytest
import torch
from torch import nn

from effkern.optim import OneSidedShampoo, Shampoo

CASES = {
    "one-sided": {},
    "both, stale roots": {"side": "both", "precondition_frequency": 4, "grafting": "none"},
    "adam, blocks": {"grafting": "adam", "block_size": 4, "side": "both"},
    "kl": {"accumulation": "kl", "side": "both", "precondition_frequency": 2, "grafting": "none"},
    "start": {"start_step": 5, "precondition_frequency": 3},
}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 9), (9, 6), (6, 9), (5, 3, 2, 2), (7,)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def run(optimizer, first, last):
    """Steps `first` to `last`, each with gradients of its own; the third parameter has one in even steps only."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if i == 2 and t % 2 else grad
        optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_resume_to_the_bit(name, dtype):
    """Through torch.save and a weights-only load into a fresh optimizer whose learning rate was another."""
    w, v = parameters(dtype), parameters(dtype)
    first = Shampoo(w, lr=0.1, **CASES[name])
    run(first, 0, 5)
    saved = through_a_file(first.state_dict())
    with torch.no_grad():
        for p, q in zip(w, v):
            q.copy_(p)
    second = Shampoo(v, lr=3.0, **CASES[name])
    second.load_state_dict(saved)
    run(first, 5, 10)
    run(second, 5, 10)
    assert all(torch.equal(p, q) for p, q in zip(w, v))
    for p, q in zip(w, v):
        mine, other = first.state[p], second.state[q]
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[k], other[k]) and mine[k].dtype == other[k].dtype for k in mine)


def test_state_is_plain_and_its_own():
    """Tensors alone, of no more memory than they show; a saved state does not move with the optimizer."""
    w = parameters()
    optimizer = OneSidedShampoo(w)
    run(optimizer, 0, 3)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for value in state.values():
            assert type(value) is torch.Tensor
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    kept = {k: v.clone() for k, v in saved["state"][0].items() if k.startswith("left")}
    run(optimizer, 3, 5)
    assert all(torch.equal(saved["state"][0][k], v) for k, v in kept.items())


def test_loading_takes_a_copy():
    w = parameters()
    optimizer = OneSidedShampoo(w)
    run(optimizer, 0, 3)
    saved = through_a_file(optimizer.state_dict())
    reference = through_a_file(saved)
    optimizer.load_state_dict(saved)
    run(optimizer, 3, 5)
    for i, state in reference["state"].items():
        assert all(torch.equal(saved["state"][i][k], v) for k, v in state.items())


def test_states_that_do_not_fit():
    """Other shapes, block sizes and sides: refused by name before anything is changed."""
    w = parameters()
    optimizer = Shampoo(w, lr=0.1)
    run(optimizer, 0, 2)
    saved = optimizer.state_dict()

    other = parameters()
    other[1] = nn.Parameter(torch.randn(9, 8))
    target = Shampoo(other)
    run(target, 0, 1)
    before = through_a_file(target.state_dict())
    message = "'momentum' of parameter 1 of group 0, shape (9, 8), must have shape (9, 8), got (9, 6)"
    with pytest.raises(ValueError, match=re.escape(message)):
        target.load_state_dict(saved)
    after = target.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for i, state in before["state"].items():
        assert all(torch.equal(after["state"][i][k], v) for k, v in state.items())

    missing = through_a_file(saved)
    del missing["state"][0]["left_root"]
    with pytest.raises(ValueError, match=r"must hold \['left', 'left_root'\], got none for \['left_root'\]"):
        optimizer.load_state_dict(missing)
    added = through_a_file(saved)
    added["state"][0]["exp"] = torch.ones(3)
    with pytest.raises(ValueError, match="got also 'exp'"):
        optimizer.load_state_dict(added)
    with pytest.raises(ValueError, match="parameter group"):
        Shampoo(parameters()[:2]).load_state_dict(saved)


def test_the_group_of_a_saved_state_decides():
    """Like every option, side and block size come with the state: the loaded optimizer goes on as the saved one."""
    w, v = parameters(), parameters()
    first, second = Shampoo(w, lr=0.1, side="both", block_size=4), Shampoo(v, lr=0.1)
    run(first, 0, 3)
    run(second, 0, 2)
    with torch.no_grad():
        for p, q in zip(w, v):
            q.copy_(p)
    second.load_state_dict(first.state_dict())
    run(first, 3, 6)
    run(second, 3, 6)
    assert all(torch.equal(p, q) for p, q in zip(w, v))


def test_a_state_before_the_first_step():
    w, v = parameters(), parameters()
    second = Shampoo(v, lr=3.0)
    # A scheduler's own entries are no options.
    second.param_groups[0]["initial_lr"] = 3.0
    second.load_state_dict(Shampoo(w, lr=0.1).state_dict())
    first = Shampoo(w, lr=0.1)
    run(first, 0, 2)
    run(second, 0, 2)
    assert all(torch.equal(p, q) for p, q in zip(w, v))


@pytest.mark.parametrize("key", ["momentum", "second_moment", "step"])
def test_states_that_are_not_whole(key):
    w = parameters()
    optimizer = Shampoo(w, grafting="adam")
    run(optimizer, 0, 2)
    saved = through_a_file(optimizer.state_dict())
    del saved["state"][0][key]
    with pytest.raises(ValueError, match=rf"parameter 0 of group 0, .* must hold .* got none for .*{key}"):
        optimizer.load_state_dict(saved)
    for vector in ("exp_avg", "exp_avg_sq", "step"):
        saved = through_a_file(optimizer.state_dict())
        del saved["state"][4][vector]
        with pytest.raises(ValueError, match=rf"parameter 4 of group 0, .* must hold .* got none for \['{vector}'\]"):
            optimizer.load_state_dict(saved)


def test_states_of_other_optimizers_and_groups():
    """AdamW's state of vectors fits in shape; its options are not Shampoo's. Other groups: torch refuses."""
    vector = nn.Parameter(torch.randn(4))
    other = torch.optim.AdamW([vector])
    run(other, 0, 1)
    with pytest.raises(ValueError, match=r"saved group 0 must have Shampoo's options, got none for \['accumulation', "):
        Shampoo([vector]).load_state_dict(other.state_dict())
    a, b = parameters()[:2]
    one, two = Shampoo([a, b]), Shampoo([{"params": [a]}, {"params": [b]}])
    run(one, 0, 1)
    for target, source in ((two, one), (one, two)):
        with pytest.raises(ValueError, match="parameter group"):
            target.load_state_dict(source.state_dict())
    saved = one.state_dict()
    saved["param_groups"][0]["ridge"] = -1.0
    with pytest.raises(ValueError, match=r"ridge must be at least 0, got -1.0"):
        one.load_state_dict(saved)


def test_hooks_change_what_is_loaded():
    w = parameters()
    optimizer = Shampoo(w)
    run(optimizer, 0, 2)
    saved = through_a_file(optimizer.state_dict())

    def halve(_, state):
        momentum = 0.5 * state["state"][0]["momentum"]
        return {**state, "state": {**state["state"], 0: {**state["state"][0], "momentum": momentum}}}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[w[0]]["momentum"], 0.5 * saved["state"][0]["momentum"])
    assert torch.equal(optimizer.state[w[1]]["momentum"], saved["state"][1]["momentum"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_states_of_another_dtype(dtype):
    """A float32 run goes on in other weights' dtype: state becomes float64 or stays float32, AdamW's that of the
    weights, which in float64 loses nothing."""
    w, v = parameters(), [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
    first, second = Shampoo(w), Shampoo(v)
    run(first, 0, 3)
    second.load_state_dict(first.state_dict())
    momentum = first.state[w[0]]["momentum"].double().clone()
    for optimizer in (first, second):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    wide = torch.promote_types(dtype, torch.float32)
    state = second.state[v[0]]
    assert {state[k].dtype for k in state if k != "step"} == {wide}
    assert {second.state[v[4]][k].dtype for k in ("exp_avg", "exp_avg_sq")} == {dtype}
    torch.testing.assert_close(state["momentum"].double(), 0.9 * momentum, rtol=1e-6, atol=0)
