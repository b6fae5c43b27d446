"""roles of models that are wrapped, adapted or named in ways of their own."""

import pytest
import torch
from torch import nn

from effkern.nn.lora import inject_lora
from effkern.optim import create, roles
from tests.optim.test_create import Net, names_of, net


class Wrapper(nn.Module):
    """As DistributedDataParallel and LightningModules hold a model."""

    def __init__(self, module):
        super().__init__()
        self.module, self.loss = module, nn.CrossEntropyLoss()


class LanguageModel(nn.Module):
    """As transformers has it: the layers are named by methods, which parts without them have too."""

    def __init__(self):
        super().__init__()
        self.body, self.table = Body(), nn.Module()
        self.table.weight, self.classes = nn.Parameter(torch.randn(9, 8)), nn.Linear(8, 9, bias=False)

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.classes


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.up = nn.Conv2d(3, 8, 4), nn.Linear(8, 8, bias=False)
        # Not an output layer of the model: it is neither at the top nor alone in what wraps it.
        self.head = nn.Linear(8, 8, bias=False)

    def get_input_embeddings(self):
        return self.patches

    def get_output_embeddings(self):
        raise NotImplementedError


@pytest.mark.parametrize("beside", [False, True])
def test_output_layers_of_wrapped_models(beside):
    wrapped = Wrapper(LanguageModel())
    if beside:
        wrapped.probe = nn.Linear(8, 8, bias=False)
    found = names_of(roles(wrapped))
    assert found["output"] == ["module.classes.weight"]
    assert found["embeddings"] == ["module.table.weight"]
    matrices = ["module.body.patches.weight", "module.body.up.weight", "module.body.head.weight"]
    assert found["matrices"] == matrices + ["probe.weight"] * beside


def test_heads_of_wrapped_models():
    assert names_of(roles(Wrapper(Wrapper(net()))))["output"] == ["module.module.head.weight"]
    compiled = torch.compile(net(), backend="eager")
    assert names_of(roles(compiled))["output"] == ["_orig_mod.head.weight"]


def test_heads_of_several_layers_and_of_adapted_ones():
    model = net()
    model.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 11))
    assert "output" not in names_of(roles(model))
    assert names_of(roles(model, output=["head.2.weight"]))["output"] == ["head.2.weight"]
    adapted = net()
    inject_lora(adapted, ["head"], rank=2)
    adapted.requires_grad_(True)
    assert names_of(roles(adapted))["output"] == ["head.base_layer.weight"]


def test_norms_by_name_have_no_matrices():
    class NormedLinear(nn.Linear):
        pass

    class ScaleNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

    model = nn.Sequential(NormedLinear(8, 8), ScaleNorm(), nn.LayerNorm([4, 8]), nn.BatchNorm1d(8))
    found = names_of(roles(model))
    assert found["matrices"] == ["0.weight"]
    assert found["vectors"] == ["0.bias"]
    assert found["norms"] == ["1.weight", "2.weight", "2.bias", "3.weight", "3.bias"]


def adapted_by_peft(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **options))


def test_a_copy_of_the_head_that_peft_trains():
    found = names_of(roles(adapted_by_peft(Net(), target_modules=["up"], modules_to_save=["head"])))
    assert found["output"] == ["base_model.model.head.modules_to_save.default.weight"]
    assert set(found) == {"output", "lora"}


def test_rows_of_embeddings_that_peft_trains():
    model = adapted_by_peft(Net(), target_modules=["up"], trainable_token_indices={"embed": [1, 2]})
    found = names_of(roles(model))
    assert [name.rsplit(".", 2)[-2] for name in found["embeddings"]] == ["trainable_tokens_delta"]
    assert set(found) == {"embeddings", "lora"}
    optimizer = create("lora_rite", model)
    assert [group["role"] for group in optimizer.parts[1].param_groups] == ["embeddings"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 8, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(torch.einsum("bi,eio->bo", x, self.gate_up))


@pytest.mark.filterwarnings("ignore")
def test_lora_of_stacked_experts():
    """Its factors are no pairs of one product each: AdamW and Shampoo step them, LoRA optimizers refuse."""
    model = nn.Sequential()
    model.experts, model.out = Experts(), nn.Linear(8, 8)
    model = adapted_by_peft(model, target_modules=["out"], target_parameters=["experts.gate_up"])
    found = names_of(roles(model))
    assert set(found) == {"lora"}
    assert len(found["lora"]) == 4
    for name in ("adamw", "shampoo"):
        optimizer = create(name, model, lr=0.01)
        nn.functional.mse_loss(model(torch.ones(2, 8)), torch.zeros(2, 8)).backward()
        before = [p.detach().clone() for _, p in roles(model)["lora"]]
        optimizer.step()
        assert any(not torch.equal(p, old) for (_, p), old in zip(roles(model)["lora"], before))
    with pytest.raises(ValueError, match="must hold one product, got 4 experts in one factor"):
        create("lora_rite", model)
