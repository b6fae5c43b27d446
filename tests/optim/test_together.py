"""Together as torch, checkpointing libraries and trainers handle an optimizer."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from effkern.optim import create
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
