"""The decoder with LAuReL residuals: counts, starts, caches, weight decay, compile, and a training run."""

from dataclasses import replace

import pytest
import torch

from effkern.models import Decoder, DecoderConfig, LaurelConfig, count_parameters, generate
from effkern.nn import LaurelResidual
from effkern.nn.laurel import VARIANTS
from effkern.train.optimizer import split_decay

SMALL = DecoderConfig(
    vocab_size=37, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, mlp_size=40, max_seq_len=32
)


def config(variant="rw+lr", placement="both", **options) -> DecoderConfig:
    return replace(SMALL, residual="laurel", laurel=LaurelConfig(variant, 4, placement, **options))


def disturbed(c: DecoderConfig) -> Decoder:
    model = Decoder(c)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, LaurelResidual):
                for p in m.parameters():
                    p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("placement", ["attn", "ffn", "both", "block"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_and_place(variant, placement):
    c = config(variant, placement, x0=True)
    model, tokens = Decoder(c), torch.randint(0, 37, (2, 9))
    assert count_parameters(c) == sum(p.numel() for p in model.parameters())
    residuals = [m for m in model.modules() if isinstance(m, LaurelResidual)]
    assert len(residuals) == SMALL.num_layers * (2 if placement == "both" else 1)
    torch.testing.assert_close(model(tokens), Decoder(SMALL)(tokens), rtol=1e-5, atol=1e-5)
    model = disturbed(c)
    hidden = model(tokens)
    assert not torch.allclose(hidden, Decoder(SMALL)(tokens), atol=1e-2)
    hidden.square().sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters())


@pytest.mark.parametrize("variant", ["rw+lr", "pa-shared", "rw+lr+pa", "rw+pa"])
def test_cache(variant):
    """Generation with a cache is that without: residuals reach across layers, never across tokens."""
    model, prompt = disturbed(config(variant)), torch.randint(0, 37, (2, 5))
    assert torch.equal(generate(model, prompt, 8), generate(model, prompt, 8, use_cache=False))


def test_block_is_its_formula():
    """placement="block": alpha (attention + mlp) + beta (x + x A B) around the plain inner residual."""
    model = disturbed(config("rw+lr", "block"))
    block, x = model.stack.blocks[0], torch.randn(1, 6, 24)
    from effkern.models.rope import rope_table

    rope = rope_table(0, 6, SMALL.head_size, SMALL.rope_theta, x.device, x.dtype)
    first = block.attention(block.attention_norm(x), rope)
    second = block.mlp(block.mlp_norm(x + first))
    r = block.block_residual.laurel
    alpha, beta = 2 * r.weights.softmax(0)
    truth = alpha * (first + second) + beta * (x + x @ r.down @ r.up)
    torch.testing.assert_close(block(x, rope)[0], truth, rtol=1e-5, atol=1e-5)


def test_scalars_get_no_weight_decay():
    model = Decoder(config("rw+lr+pa", per_channel=True, x0=True))
    decayed, plain = (set(map(id, group)) for group in split_decay(model))
    names = {name for name, p in model.named_parameters() if "laurel" in name and id(p) in plain}
    assert {name.rsplit(".", 1)[1] for name in names} == {"weights", "gamma", "x0_weight"}
    matrices = {name for name, p in model.named_parameters() if "laurel" in name and id(p) in decayed}
    assert {name.rsplit(".", 1)[1] for name in matrices} == {"down", "up"}


@pytest.mark.parametrize("variant", ["rw+lr+pa", "pa-shared"])
def test_compiles(variant):
    model, tokens = disturbed(config(variant)), torch.randint(0, 37, (2, 9))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_it_learns():
    """A few steps on one batch: the loss falls, and every LAuReL parameter has moved."""
    model, tokens = Decoder(config("rw+lr+pa")), torch.randint(0, 37, (4, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "laurel" in n}
    losses = []
    for _ in range(60):
        logits = model.logits(model(tokens[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "rw-lr"}, "LaurelConfig: variant must be one of"),
        ({"placement": "mlp"}, "LaurelConfig: placement must be one of .*got 'mlp'"),
        ({"rank": 0}, "LaurelConfig: rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.5}, "LaurelConfig: rank must be a whole number of at least 1, got 2.5"),
        ({"look_back": 0}, "LaurelConfig: look_back must be a whole number of at least 1, got 0"),
        ({"scalar_map": "relu"}, "LaurelConfig: scalar_map must be one of"),
        ({"rank": 25}, "DecoderConfig: laurel.rank must be at most hidden_size=24, got 25"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, residual="laurel", laurel=LaurelConfig(**options))
