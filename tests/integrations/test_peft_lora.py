"""Models adapted by PEFT: their pairs, a training step, and adapter files in both directions."""

import pytest
import torch
from torch import nn

from effkern.nn.lora import inject_lora, load_lora_state_dict, lora_state_dict
from effkern.optim import LoRARite, find_pairs

peft = pytest.importorskip("peft")


def base():
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(9, 6), "up": nn.Linear(6, 8), "down": nn.Linear(8, 6)})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = base()

    def forward(self, ids):
        return self.parts["down"](torch.tanh(self.parts["up"](self.parts["embed"](ids))))


def adapted(**options):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["embed", "up", "down"], **options)
    return peft.get_peft_model(Net(), config)


def test_pairs_and_training():
    model = adapted()
    assert [(list(p.A.shape), list(p.B.shape)) for p in find_pairs(model)] == [
        ([2, 9], [6, 2]), ([2, 6], [8, 2]), ([2, 8], [6, 2]),
    ]  # fmt: skip
    optimizer = LoRARite(model, lr=0.05)
    ids, target = torch.arange(9), torch.randn(9, 6)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(ids) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_magnitudes_of_dora_are_named():
    config = peft.LoraConfig(r=2, target_modules=["up"], use_dora=True)
    with pytest.raises(ValueError, match=r"other trainable parameters: .*lora_magnitude_vector.default.weight"):
        LoRARite(peft.get_peft_model(Net(), config))


def test_adapter_files_fit_in_both_directions():
    model, own = adapted(), Net()
    inject_lora(own, ["embed", "up", "down"], rank=2, alpha=4.0)
    for pair in find_pairs(model):
        pair.B.data.normal_()
        pair.A.data.normal_()
    theirs = peft.get_peft_model_state_dict(model)
    assert theirs.keys() == lora_state_dict(own).keys()
    load_lora_state_dict(own, theirs)
    ids = torch.arange(9)
    torch.testing.assert_close(own(ids), model(ids))
    for value in lora_state_dict(own).values():
        value.data.mul_(0.5)
    peft.set_peft_model_state_dict(model, lora_state_dict(own))
    torch.testing.assert_close(model(ids), own(ids))
