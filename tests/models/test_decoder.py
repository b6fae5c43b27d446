"""The decoder: sizes from the formula, init, attention against the formula, compile."""

import math
from dataclasses import replace

import pytest
import torch

from effkern.models import (
    RESIDUALS,
    STACKS,
    AddResidual,
    Decoder,
    DecoderConfig,
    PlainStack,
    count_parameters,
    forward_flops,
    register,
)

SMALL = DecoderConfig(
    vocab_size=37, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=40, max_seq_len=32, head_dim=8
)
SHAPES = [
    SMALL,
    replace(SMALL, tie_head=False, vocab_multiple=16),  # own head, padded vocabulary
    replace(SMALL, num_kv_heads=4, head_dim=0),  # no grouping, derived head size
    replace(SMALL, num_kv_heads=1, num_layers=3),  # one key/value head
]


@pytest.mark.parametrize("config", SHAPES)
def test_count_parameters_is_the_models(config):
    assert count_parameters(config) == sum(p.numel() for p in Decoder(config).parameters())


def test_flops_equal_two_per_weight_and_the_pairs_of_attention():
    flops = forward_flops(SMALL, 10)
    matrices = sum(p.numel() for n, p in Decoder(SMALL).named_parameters() if p.dim() == 2 and "embedding" not in n)
    # Norm weights count as products too; they are the only difference.
    assert flops.blocks == 2 * (matrices + 2 * 2 * SMALL.hidden_size)
    pairs = sum(range(1, 11)) / 10
    assert flops.attention == 2 * (2 * 2 * pairs * SMALL.num_heads * SMALL.head_size)
    assert flops.head == 2 * 37 * 24
    assert flops.total == flops.blocks + flops.attention + flops.head


def plain_forward(model, tokens):
    """The decoder written out with explicit loops over heads and a complex rotation."""
    c = model.config
    x = model.embedding.weight[tokens]

    def norm(v, w):
        return v / (v.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w

    length, dim = tokens.shape[1], c.head_size
    half = dim // 2
    angle = torch.arange(length).double()[:, None] * c.rope_theta ** (-torch.arange(half).double() * 2 / dim)
    turn = torch.polar(torch.ones_like(angle), angle)
    mask = torch.ones(length, length).tril().log().double()

    def rotate(v):
        z = torch.complex(v[..., :half], v[..., half:]) * turn
        return torch.cat((z.real, z.imag), -1)

    for block in model.stack.blocks:
        qkv = norm(x, block.attention_norm.weight) @ block.attention.qkv.weight.T
        heads = qkv.split(dim, dim=-1)
        out = []
        for h in range(c.num_heads):
            kv = c.num_heads + h * c.num_kv_heads // c.num_heads
            q, k, v = rotate(heads[h]), rotate(heads[kv]), heads[kv + c.num_kv_heads]
            out.append((q @ k.transpose(1, 2) / math.sqrt(dim) + mask).softmax(-1) @ v)
        x = x + torch.cat(out, -1) @ block.attention.out.weight.T
        gate, up = (norm(x, block.mlp_norm.weight) @ block.mlp.gate_up.weight.T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ block.mlp.down.weight.T
    return norm(x, model.norm.weight)


@pytest.mark.parametrize("config", SHAPES)
def test_forward_equals_the_formula(config):
    model = Decoder(config, seed=3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokens = torch.randint(0, 37, (2, 9))
    torch.testing.assert_close(model(tokens), plain_forward(model, tokens), rtol=1e-10, atol=1e-10)


def test_logits_leave_out_the_padding():
    config = replace(SMALL, vocab_multiple=16)
    model = Decoder(config)
    assert (model.head_weight.shape[0], model.vocab_valid) == (48, 37)
    hidden = torch.randn(3, 24)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embedding.weight[:37].T)
    assert Decoder(SMALL).vocab_valid is None


def test_init_depends_on_seed_alone():
    torch.manual_seed(1)
    first = Decoder(SMALL, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = Decoder(SMALL, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.embedding.weight, Decoder(SMALL, seed=6).embedding.weight)
    torch.manual_seed(1)
    Decoder(SMALL)
    assert torch.equal(torch.get_rng_state(), state)


def test_init_of_a_parameter_does_not_depend_on_the_other_parts():
    deep = Decoder(replace(SMALL, num_layers=4), seed=5).state_dict()
    for name, tensor in Decoder(SMALL, seed=5).state_dict().items():
        # Branch outputs are scaled by the depth, on purpose.
        scale = math.sqrt(2) if name.endswith(("out.weight", "down.weight")) else 1.0
        torch.testing.assert_close(deep[name] * scale, tensor)


def test_init_scales():
    model = Decoder(replace(SMALL, hidden_size=256, mlp_size=512, vocab_size=1000), seed=0)
    block = model.stack.blocks[0]
    for weight, std in (
        (model.embedding.weight, SMALL.init_std),
        (block.attention.qkv.weight, 256**-0.5),
        (block.mlp.gate_up.weight, 256**-0.5),
        (block.mlp.down.weight, (4 * 512) ** -0.5),
        (block.attention.out.weight, (4 * 32) ** -0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert torch.equal(block.mlp_norm.weight, torch.ones(256))


def test_norm_runs_in_float32():
    norm = Decoder(SMALL).norm.bfloat16()
    x = (torch.randn(4, 24) * 100).bfloat16()
    wide = x.float()
    expected = (wide * (wide.pow(2).mean(-1, keepdim=True) + SMALL.norm_eps).rsqrt()).bfloat16()
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("config", SHAPES[:2])
def test_compiles_to_one_graph(config):
    model = Decoder(config, dtype=torch.float64)
    tokens = torch.randint(0, 37, (2, 9))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = model(tokens)
    torch.testing.assert_close(compiled(tokens), eager)
    weight = torch.randn_like(eager)
    expected = torch.autograd.grad((eager * weight).sum(), list(model.stack.parameters()))
    found = torch.autograd.grad((compiled(tokens) * weight).sum(), list(model.stack.parameters()))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiles_with_inductor():
    model = Decoder(SMALL)
    tokens = torch.randint(0, 37, (2, 9))
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(tokens), model(tokens), rtol=1e-4, atol=1e-5)


def test_a_new_part_is_chosen_by_name(monkeypatch):
    monkeypatch.setattr("effkern.models.parts.RESIDUALS", RESIDUALS)

    class HalfResidual(AddResidual):
        def __init__(self, config, place):
            super().__init__(config, place)
            self.scale = torch.nn.Parameter(torch.empty(config.hidden_size))

        @staticmethod
        def count(config, place):
            return config.hidden_size

        def fill(self, generator):
            torch.nn.init.constant_(self.scale, 0.5)

        def forward(self, stream, branch):
            return stream + self.scale * branch

    class TwiceStack(PlainStack):
        @staticmethod
        def applications(config):
            return 2 * config.num_layers

        def forward(self, stream, rope, cache=None):
            return super().forward(super().forward(stream, rope), rope)

    try:
        register(RESIDUALS, "half")(HalfResidual)
        register(STACKS, "twice")(TwiceStack)
        config = replace(SMALL, residual="half", stack="twice")
        model = Decoder(config)
        assert (
            count_parameters(config) == sum(p.numel() for p in model.parameters()) == count_parameters(SMALL) + 4 * 24
        )
        assert forward_flops(config, 8).attention == 2 * forward_flops(SMALL, 8).attention
        assert len(model.new_cache(1, 4).layers) == 4
        assert torch.isfinite(model(torch.randint(0, 37, (1, 5)))).all()
        with pytest.raises(ValueError, match=r"register: name must be new, got 'half'"):
            register(RESIDUALS, "half")(HalfResidual)
    finally:
        RESIDUALS.pop("half", None)
        STACKS.pop("twice", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, r"hidden_size must be at least 1, got 0"),
        ({"num_kv_heads": 3}, r"num_kv_heads must divide num_heads=4, got 3"),
        ({"head_dim": 0, "hidden_size": 30}, r"hidden_size must be a multiple of num_heads=4, got 30"),
        ({"head_dim": 5}, r"head_dim must be even for rotary positions, got 5"),
        ({"norm_eps": 0.0}, r"norm_eps must be positive, got 0.0"),
        ({"residual": "laurell"}, r"residual must be one of \['add'.*\], got 'laurell'"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match="DecoderConfig: " + message):
        replace(SMALL, **change)


def test_too_long_a_sequence():
    with pytest.raises(ValueError, match=r"Decoder: tokens must be at most max_seq_len=32 positions, got 33"):
        Decoder(SMALL)(torch.zeros(1, 33, dtype=torch.int64))


def test_a_part_that_cannot_fill_itself_is_an_error():
    class Mute(AddResidual):
        def __init__(self, config, place):
            super().__init__(config, place)
            self.bias = torch.nn.Parameter(torch.zeros(1))

    try:
        register(RESIDUALS, "mute")(Mute)
        with pytest.raises(RuntimeError, match=r"'stack.blocks.0.attention_residual' owns parameters but has no fill"):
            Decoder(replace(SMALL, residual="mute"))
    finally:
        RESIDUALS.pop("mute", None)
