"""Together as torch, checkpointing libraries and trainers handle an optimizer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from effkern.optim import Together, create
from tests.optim.test_create import flat, lora_or_not, train


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", ["muon", "shampoo", "lora_rite"])
def test_distributed_checkpoint(name, flatten):
    """States keyed by parameters' names, into an optimizer that has not stepped: the same steps from there."""
    model = lora_or_not(name)
    optimizer = create(name, model, lr=0.02)
    train(model, optimizer, 2)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    # A copy, as a file is: loading shares memory with what it is given.
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin = copy.deepcopy(model)
    resumed = create(name, twin, lr=0.5)
    set_optimizer_state_dict(twin, resumed, state, options=options)
    assert [group["lr"] for group in resumed.param_groups] == [0.02] * len(resumed.param_groups)
    train(model, optimizer, 2)
    train(twin, resumed, 2)
    assert torch.equal(flat(model), flat(twin))


def stepped(name="muon", steps=2):
    model = lora_or_not(name)
    optimizer = create(name, model, lr=0.02)
    train(model, optimizer, steps)
    return model, optimizer


def test_state_is_written_through():
    """As trainers move state between devices, clear it, and set groups."""
    model, optimizer = stepped()
    assert len(optimizer.state) == len(list(optimizer.state)) == sum(len(part.state) for part in optimizer.parts)
    kept = copy.copy(dict(optimizer.state))
    for param, entry in optimizer.state.items():
        optimizer.state[param] = {k: torch.zeros_like(v) if torch.is_tensor(v) else v for k, v in entry.items()}
    tensors = [v for part in optimizer.parts for entry in part.state.values() for v in entry.values()]
    assert all(not v.any() for v in tensors if torch.is_tensor(v))
    optimizer.state = kept
    assert {id(v) for part in optimizer.parts for v in part.state.values()} == {id(v) for v in kept.values()}
    assert optimizer.state.pop(model.up.weight) is kept[model.up.weight]
    assert optimizer.state.get(model.up.weight) is None
    assert model.up.weight not in optimizer.parts[0].state
    assert optimizer.state.setdefault(model.up.weight, kept[model.up.weight]) is kept[model.up.weight]
    assert len(pickle.loads(pickle.dumps(optimizer.state))) == len(optimizer.state)
    assert optimizer.state.pop(torch.ones(1), None) is None
    del optimizer.state[model.embed.weight]
    assert optimizer.state[model.embed.weight] == {}
    before = len(optimizer.state)
    with pytest.raises(KeyError, match="must be of a parameter of one of parts"):
        optimizer.state = {torch.ones(1): {}}
    assert len(optimizer.state) == before
    optimizer.state.clear()
    assert [len(part.state) for part in optimizer.parts] == [0, 0]


def test_groups_are_written_through():
    _, optimizer = stepped()
    optimizer.param_groups = [{**group, "lr": 0.5} for group in optimizer.param_groups]
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.5}
    with pytest.raises(ValueError, match=r"param_groups must be 6, those of parts in order, got 0"):
        optimizer.param_groups = []
    assert len(optimizer.param_groups) == 6


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_hooks_of_states(name):
    """Together runs them as torch's own optimizer does, and takes what they return."""
    _, optimizer = stepped(name)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append(("before saving", opt is optimizer)))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": len(calls)})
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append(("after loading", opt is optimizer)))

    @optimizer.register_load_state_dict_pre_hook
    def halved(opt, state):
        calls.append(("before loading", state["note"]))
        return {**state, "param_groups": [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]}

    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert calls == [("before saving", True), ("before loading", 1), ("after loading", True)]
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    assert {group["lr"] for group in state["param_groups"]} == {0.02}


@pytest.mark.parametrize("name", ["muon", "lora_rite"])
def test_a_refused_state_changes_no_part(name):
    """The second part refuses, after the first has loaded: both stay, and step as if nothing had been tried."""
    model, optimizer = stepped(name)
    twin, other = copy.deepcopy((model, optimizer))
    other_state = stepped(name, 3)[1].state_dict()
    other_state["param_groups"][0]["lr"] = 7.0

    def refuse(part, state):
        assert optimizer.param_groups[0]["lr"] == 7.0
        raise RuntimeError("refused")

    handle = optimizer.parts[1].register_load_state_dict_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="refused"):
        optimizer.load_state_dict(other_state)
    handle.remove()
    assert [group["lr"] for group in optimizer.param_groups] == [0.02] * len(optimizer.param_groups)
    assert train(model, optimizer, 2) == train(twin, other, 2)
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("name", ["muon", "one_sided_shampoo"])
def test_schedulers_that_set_rates_keep_the_ratio_if_given_a_list(name):
    model = lora_or_not(name)
    optimizer = create(name, model, lr=0.01, matrix_lr_ratio=3.0)
    wanted = [group.get("lr_ratio", 1.0) for group in optimizer.param_groups]
    assert 3.0 in wanted
    rates = [group["lr"] for group in optimizer.param_groups]
    kinds = torch.optim.lr_scheduler
    schedules = (
        lambda: kinds.OneCycleLR(optimizer, max_lr=rates, total_steps=10, cycle_momentum=False),
        lambda: kinds.CyclicLR(optimizer, [rate / 9 for rate in rates], rates, cycle_momentum=False),
    )
    for schedule in schedules:
        scheduler = schedule()
        seen = set()
        for _ in range(4):
            train(model, optimizer, 1, scheduler)
            lrs = [group["lr"] for group in optimizer.param_groups]
            assert [lr / lrs[-1] for lr in lrs] == pytest.approx(wanted)
            seen.add(lrs[-1])
        assert len(seen) == 4
    # One rate for all undoes it, which is why the documents ask for a list.
    kinds.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


def test_together_refuses():
    a, b = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    one, two = torch.optim.SGD([a], lr=0.1), torch.optim.AdamW([b], lr=0.1)
    with pytest.raises(ValueError, match="parts must be one optimizer at least, got none"):
        Together()
    with pytest.raises(ValueError, match="parts must not share parameters"):
        Together(one, torch.optim.SGD([a, b], lr=0.1))
    both = Together(one, two)
    with pytest.raises(NotImplementedError, match="a group must be added to one of parts"):
        both.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match=r"state_dict must be of groups with \[1, 1\] parameters, got \[1\]"):
        both.load_state_dict(one.state_dict())
