"""Sampling: with and without cache, filters, seeds, end of text."""

import math
from dataclasses import replace

import pytest
import torch

from effkern.models import Decoder, DecoderConfig, generate, generate_with_loops
from effkern.models.generate import _draw, _filter_logits
from tests.models.loop_models import looped

CONFIG = DecoderConfig(
    vocab_size=37, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=40, max_seq_len=32, head_dim=8
)


def noisy(config=CONFIG):
    model = Decoder(config, seed=1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, tie_head=False, num_kv_heads=1)])
def test_cache_gives_the_tokens_of_full_recomputation(config, temperature):
    model = noisy(config)
    prompt = torch.randint(0, 37, (3, 5))
    cached = generate(model, prompt, 20, temperature=temperature, seed=4)
    assert cached.shape == (3, 25)
    assert torch.equal(cached, generate(model, prompt, 20, temperature=temperature, seed=4, use_cache=False))
    assert torch.equal(cached[:, :5], prompt)


def test_cache_in_pieces_gives_the_hidden_states_of_one_pass():
    model = noisy()
    tokens = torch.randint(0, 37, (2, 12))
    cache = model.new_cache(2, 12)
    # First fill, several tokens on top of a past (masked), one token.
    pieces = torch.cat([model(tokens[:, a:b], cache) for a, b in ((0, 5), (5, 11), (11, 12))], dim=1)
    torch.testing.assert_close(pieces, model(tokens), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"LayerCache: positions must be at most 12, got 13"):
        model(tokens[:, :1], cache)


def test_greedy_takes_the_most_likely_token():
    model = noisy()
    tokens = generate(model, torch.tensor([[1, 2]]), 6)
    for i in range(2, 8):
        assert model.logits(model(tokens[:, :i]))[0, -1].argmax() == tokens[0, i]


def test_seed_decides_the_draws():
    model, prompt = noisy(), torch.tensor([[1, 2, 3]])
    first = generate(model, prompt, 20, temperature=1.0, seed=7)
    torch.manual_seed(99)
    assert torch.equal(first, generate(model, prompt, 20, temperature=1.0, seed=7))
    assert not torch.equal(first, generate(model, prompt, 20, temperature=1.0, seed=8))


def test_top_k_and_top_p_keep_the_right_tokens():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]], dtype=torch.float64).log()
    assert _filter_logits(logits, 2, None).isfinite().tolist() == [[False, True, True, False]]
    # 0.4 + 0.3 reaches 0.65; 0.4 alone does not.
    assert _filter_logits(logits, None, 0.65).isfinite().tolist() == [[False, True, True, False]]
    assert _filter_logits(logits, None, 0.39).isfinite().tolist() == [[False, True, False, False]]
    assert _filter_logits(logits, None, 1.0).isfinite().all()


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    draws = _draw(probs.log().expand(20000, 4), torch.Generator().manual_seed(0)).flatten()
    counts = torch.bincount(draws, minlength=4) / 20000
    assert counts[1] == 0
    # Four standard errors of a share.
    assert ((counts - probs).abs() <= 4 * (probs * (1 - probs) / 20000).sqrt() + 1e-12).all()


def test_rows_end_with_eos():
    model, prompt = noisy(), torch.randint(0, 37, (4, 3))
    free = generate(model, prompt, 12, temperature=1.0, seed=3)
    eos = int(free[0, 6])
    tokens = generate(model, prompt, 12, temperature=1.0, seed=3, eos=eos)
    for row, plain in zip(tokens.tolist(), free.tolist()):
        new, expected = row[3:], plain[3 : len(row)]
        end = expected.index(eos) if eos in expected else len(new)
        assert new[: end + 1] == expected[: end + 1]
        assert set(new[end:]) <= {eos}
    assert generate(model, prompt, 0).shape == (4, 3)
    stopped = generate(
        model,
        prompt[:1],
        12,
        temperature=1.0,
        seed=3,
        eos=int(generate(model, prompt[:1], 1, temperature=1.0, seed=3)[0, 3]),
    )
    assert stopped.shape == (1, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 31}, r"prompt \+ max_new_tokens must be at most max_seq_len=32, got 33"),
        ({"max_new_tokens": -1}, r"max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, r"temperature must be at least 0, got -0.5"),
        ({"temperature": math.nan}, r"temperature must be at least 0, got nan"),
        ({"top_p": math.nan}, r"top_p must be in \(0, 1\], got nan"),
        ({"eos": 37}, "eos must be a token below vocab_size=37, got 37"),
        ({"eos": -1}, "eos must be a token below vocab_size=37, got -1"),
        ({"top_k": 0}, r"top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        (
            {"tokens_BT": torch.zeros(3, dtype=torch.int64)},
            r"tokens_BT must have shape \[B, T\] with T >= 1, got \(3,\)",
        ),
    ],
)
def test_errors(kwargs, message):
    arguments = {"tokens_BT": torch.zeros(1, 2, dtype=torch.int64), "max_new_tokens": 4, **kwargs}
    with pytest.raises(ValueError, match="generate: " + message):
        generate(noisy(), **arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loops": 2.0}, r"Decoder: loops must be a whole number, or one for each looped stage, got 2\.0"),
        ({"loops": True}, "Decoder: loops must be whole numbers, got True"),
        ({"kv_policy": 3}, "generate: kv_policy must be a name or a KVPolicy, got 3"),
        ({"exit": 5}, "exit: test must be a name, NAME=NUMBER or an ExitTest, got 5"),
        ({"max_new_tokens": 4.0}, r"generate: max_new_tokens must be a whole number, got 4\.0"),
        ({"temperature": "1"}, "generate: temperature must be a number, got '1'"),
        ({"top_k": 2.5}, r"generate: top_k must be a whole number, got 2\.5"),
        ({"top_p": "all"}, "generate: top_p must be a number, got 'all'"),
        ({"eos": 1.0}, r"generate: eos must be a whole number, got 1\.0"),
        ({"seed": None}, "generate: seed must be a whole number, got None"),
    ],
)
def test_arguments_of_another_type(kwargs, message):
    arguments = {"tokens_BT": torch.zeros(1, 2, dtype=torch.int64), "max_new_tokens": 4, **kwargs}
    with pytest.raises(TypeError, match=message):
        generate(Decoder(looped()), **arguments)


@pytest.mark.parametrize("options", [{}, {"exit": "cosine"}, {"use_cache": False}, {"eos": 1}, {"temperature": 1.0}])
def test_no_prompts(options):
    found = generate_with_loops(Decoder(looped("1x2,1x1,1x3")), torch.zeros(0, 3).long(), 4, **options)
    assert (found.tokens.shape, found.tokens.dtype) == ((0, 7), torch.int64)
    assert found.loops.shape == (0, 4, 2)


@pytest.mark.parametrize("options", [{}, {"exit": "cosine=0.1", "temperature": 1.0}, {"temperature": 1.0}], ids=str)
def test_a_model_in_training_generates_what_it_generates_in_evaluation(options):
    """Its first states are noise and its numbers of loops are drawn, in training; and its mode is as it was."""
    model = noisy(looped(init="noise", sample="uniform", injection="add")).train()
    model.stack.stages[0].eval()
    modes, prompt = [m.training for m in model.modules()], torch.randint(0, 37, (3, 5))
    torch.manual_seed(1)
    first = generate(model, prompt, 12, **options)
    assert torch.equal(first, generate(model, prompt, 12, **options))
    if "exit" not in options:
        assert torch.equal(first, generate(model, prompt, 12, use_cache=False, **options))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(first, generate(model.eval(), prompt, 12, **options))
