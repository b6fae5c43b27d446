"""Adapters: forward and merge against the dense weight, names as PEFT has them, what is refused."""

import pytest
import torch
from torch import nn

from effkern.nn.lora import (
    LoraConv2d,
    LoraEmbedding,
    LoraLinear,
    inject_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora,
    merged_state_dict,
)


def layer(kind, dtype=torch.float64, **options):
    base, x = {
        "linear": lambda: (nn.Linear(5, 7), torch.randn(2, 3, 5)),
        "embedding": lambda: (nn.Embedding(11, 6), torch.randint(11, (2, 3))),
        "conv": lambda: (nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dilation=1), torch.randn(2, 3, 8, 9)),
    }[kind]()
    wrap = {"linear": LoraLinear, "embedding": LoraEmbedding, "conv": LoraConv2d}[kind]
    made = wrap(base.to(dtype), 2, 8.0, **options)
    return made, x if kind == "embedding" else x.to(dtype)


def filled(kind, dtype=torch.float64):
    made, x = layer(kind, dtype)
    with torch.no_grad():
        for factor in made.factors():
            factor.normal_()
    return made, x


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv"])
def test_start_is_the_base_layer(kind):
    made, x = layer(kind)
    assert torch.equal(made(x), made.base_layer(x))
    assert not made.base_layer.weight.requires_grad
    assert all(factor.requires_grad for factor in made.factors())
    assert max(factor.abs().max() for factor in made.factors()) > 0


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv"])
def test_forward_gradients_and_merge_are_those_of_the_dense_weight(kind):
    made, x = filled(kind)
    A, B = made.factors()
    dense = made.base_layer.weight.detach().clone()
    product = (B.flatten(1) @ A.flatten(1)).detach() * 4.0
    dense += (product.T if kind == "embedding" else product).view_as(dense)
    y = made(x)
    made.base_layer.weight.data, kept = dense, made.base_layer.weight.data
    truth = made.base_layer(x)
    made.base_layer.weight.data = kept
    torch.testing.assert_close(y, truth)
    y.square().sum().backward()
    assert A.grad.norm() > 0
    assert B.grad.norm() > 0
    before = made.base_layer.weight.detach().clone()
    made.merge()
    made.merge()
    torch.testing.assert_close(made.base_layer.weight, dense)
    torch.testing.assert_close(made(x), truth)
    made.unmerge()
    made.unmerge()
    assert torch.equal(made.base_layer.weight, before)


def net():
    torch.manual_seed(2)
    return nn.ModuleDict({"embed": nn.Embedding(9, 4), "block": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))})


def test_inject_freezes_all_else_and_names_parameters_as_peft():
    model = net()
    assert inject_lora(model, ["embed", "block.0"], rank=lambda name: 3 if name == "embed" else 2) == [
        "embed",
        "block.0",
    ]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "embed.lora_embedding_A.default", "embed.lora_embedding_B.default",
        "block.0.lora_A.default.weight", "block.0.lora_B.default.weight",
    ]  # fmt: skip
    assert list(lora_state_dict(model)) == [
        "base_model.model.embed.lora_embedding_A", "base_model.model.embed.lora_embedding_B",
        "base_model.model.block.0.lora_A.weight", "base_model.model.block.0.lora_B.weight",
    ]  # fmt: skip
    assert {name: made.rank for name, made in lora_layers(model).items()} == {"embed": 3, "block.0": 2}


def test_seed_and_name_alone_make_the_start():
    models = [net() for _ in range(3)]
    inject_lora(models[0], ["0"], rank=2, seed=1)
    inject_lora(models[1], ["0", "1"], rank=2, seed=1)
    inject_lora(models[2], ["0"], rank=2, seed=2)
    A = [lora_layers(m)["block.0"].factors()[0] for m in models]
    assert torch.equal(A[0], A[1])
    assert not torch.equal(A[0], A[2])
    assert A[0].abs().max() <= 0.5


def test_merging_a_model_gives_back_its_own_kind():
    model = net()
    inject_lora(model, ["embed", "0"], rank=2)
    for made in lora_layers(model).values():
        for factor in made.factors():
            factor.data.normal_()
    ids = torch.randint(9, (3, 4))

    def run():
        return model["block"](model["embed"](ids))

    before, planned = run(), merged_state_dict(model)
    assert merge_lora(model) == 2
    torch.testing.assert_close(run(), before)
    assert type(model["embed"]) is nn.Embedding
    assert model.state_dict().keys() == net().state_dict().keys() == planned.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, planned[name])


def test_factors_through_a_file_of_peft():
    first, second = net(), net()
    for model in (first, second):
        inject_lora(model, ["0", "1"], rank=2)
    for made in lora_layers(first).values():
        made.factors()[1].data.normal_()
    state = {k: v.clone() for k, v in lora_state_dict(first).items()}
    load_lora_state_dict(second, {k.replace(".weight", ".default.weight"): v for k, v in state.items()})
    for name, value in lora_state_dict(second).items():
        assert torch.equal(value, state[name])
    kept = {k: v.clone() for k, v in lora_state_dict(second).items()}
    with pytest.raises(ValueError, match=r"state must hold the factors of the model, these do not fit: \['base_mod"):
        load_lora_state_dict(second, dict(list(state.items())[1:]))
    wrong = {k: v[:1] if "lora_A" in k else v + 1 for k, v in state.items()}
    with pytest.raises(ValueError, match=r"block.0.lora_A.weight must have shape \[2, 4\], got \[1, 4\]"):
        load_lora_state_dict(second, wrong)
    for name, value in lora_state_dict(second).items():
        assert torch.equal(value, kept[name])


def test_dropout_is_on_the_adapter_alone():
    made, x = filled("linear")
    torch.manual_seed(0)
    dropped = LoraLinear(made.base_layer, 2, 8.0, dropout=0.5)
    assert torch.equal(dropped.train()(x), made.base_layer(x))
    dropped.factors()[1].data.normal_()
    assert not torch.equal(dropped.train()(x), dropped(x))
    dropped.eval()
    assert torch.equal(dropped(x), dropped(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"targets must name layers of the model, got \['q'\]; it has \['0', '1'\]"):
        inject_lora(net(), ["q"])
    with pytest.raises(TypeError, match=r"inject_lora: block must be Linear, Embedding or Conv2d, got Sequential"):
        inject_lora(net(), ["block"])
    with pytest.raises(ValueError, match=r"rank must be at least 1, got 0"):
        inject_lora(net(), ["0"], rank=0)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        inject_lora(net(), ["0"], dropout=1.0)
    model = net()
    inject_lora(model, ["0"])
    with pytest.raises(ValueError, match=r"inject_lora: block.0 must have no adapter yet, got one; merge it first"):
        inject_lora(model, ["0"])
    with pytest.raises(ValueError, match=r"LoraConv2d: base must have groups=1, got 2"):
        LoraConv2d(nn.Conv2d(4, 4, 1, groups=2), 1, 1.0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("target", ["embed", "head"])
def test_a_tied_weight_gets_no_adapter(target):
    """It would be in one layer of the adapted model, and in both of the merged one."""
    model = Tied()
    with pytest.raises(ValueError, match=rf"{target} must have a weight of its own, .* embed.weight and head.weight"):
        inject_lora(model, [target])
    assert model.embed.weight.requires_grad
    assert not lora_layers(model)


def test_one_layer_under_two_names_gets_no_adapter():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"x": shared, "y": shared})
    for target in "xy":
        with pytest.raises(ValueError, match=rf"{target} must have a weight of its own, .* x.weight and y.weight"):
            inject_lora(model, [target])


def test_code_that_reads_a_weight_never_gets_one_without_its_adapter():
    made, _ = filled("linear")
    with pytest.raises(AttributeError, match="weight"):
        made.weight  # noqa: B018
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TypeError, match=r"attention.out_proj must be a layer that is called, got a part of Multihead"):
        inject_lora(attention, ["out_proj"])
    assert all(parameter.requires_grad for parameter in attention.parameters())


def test_a_refused_target_leaves_the_layers_before_it_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1, groups=2))
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"groups=1, got 2"):
        inject_lora(model, ["0", "1"])
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]
    assert type(model[0]) is nn.Linear


def test_a_model_in_eval_mode_stays_in_it():
    model = net().eval()
    inject_lora(model, ["0"], rank=2, dropout=0.5)
    assert not any(module.training for module in model.modules())


def test_an_adapter_file_of_a_layer_named_as_the_adapter():
    first, second = (nn.ModuleDict({"default": nn.ModuleDict({"default": nn.Linear(4, 3)})}) for _ in "12")
    for model in (first, second):
        inject_lora(model, ["default.default"], rank=2)
    state = {}
    for name, value in first.state_dict().items():
        if "lora_" in name:
            value.normal_()
            state[name] = value.clone()
    load_lora_state_dict(second, state)
    for name, value in state.items():
        assert torch.equal(second.state_dict()[name], value)
