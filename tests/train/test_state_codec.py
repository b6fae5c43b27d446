"""Optimizer state through safetensors and JSON, exactly."""

import json

import pytest
import torch

from effkern.train.state_codec import decode, encode


def roundtrip(value):
    tensors: dict[str, torch.Tensor] = {}
    form = json.loads(json.dumps(encode(value, tensors, "x")))
    return decode(form, tensors)


def test_types_and_values_survive():
    value = {0: [1, 2.5, None], "betas": (0.9, 0.1 + 0.2), True: "s", 1.5: {"deep": [(), {}]}, "huge": 1e308}
    found = roundtrip(value)
    assert found == value
    assert [type(k) for k in found] == [type(k) for k in value]
    assert type(found["betas"]) is tuple


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_continues_bit_for_bit(fused):
    first = torch.nn.Linear(7, 5)
    second = torch.nn.Linear(7, 5)
    second.load_state_dict(first.state_dict())
    x = torch.randn(6, 3, 7)

    def step(model, optimizer, i):
        optimizer.zero_grad()
        model(x[i]).pow(2).sum().backward()
        optimizer.step()

    a = torch.optim.AdamW(first.parameters(), lr=0.1, fused=fused, amsgrad=True)
    for i in range(3):
        step(first, a, i)
    second.load_state_dict(first.state_dict())
    b = torch.optim.AdamW(second.parameters(), lr=0.7, fused=fused, amsgrad=True)
    b.load_state_dict(roundtrip(a.state_dict()))
    for i in range(3, 6):
        step(first, a, i)
        step(second, b, i)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))
    assert all(
        torch.equal(a.state[p]["exp_avg"], b.state[q]["exp_avg"])
        for p, q in zip(first.parameters(), second.parameters())
    )


def test_decoded_tensors_are_copies():
    tensors: dict[str, torch.Tensor] = {}
    form = encode({"a": torch.arange(3)}, tensors, "x")
    decode(form, tensors)["a"] += 1
    assert tensors["x.a"].tolist() == [0, 1, 2]


def test_what_cannot_be_stored_is_named():
    with pytest.raises(TypeError, match=r"encode: x.a.1 must be a tensor, number, .* got object"):
        encode({"a": [1, object()]}, {}, "x")
