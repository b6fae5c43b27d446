"""Caches of looped decoders: every policy against a decoder written out, memory by the formula, and refusals."""

import pytest
import torch

from effkern.models import Decoder, KVPolicy, adaptive_pass, generate, generate_with_loops
from effkern.models.kv_policy import KNOWN
from tests.models.loop_models import BASE, Scripted, ScriptedByLogits, looped, noisy
from tests.models.slow_loops import SlowDecoder

POLICIES = ("full", "last", "latest-available", "cyclic-1", "cyclic-3", "block-2", "block-3", "window-2", "window-50")
# What lies between loops, each kind once.
GLUES = (
    {},
    {"injection": "add", "init": "zeros", "norm": True},
    {"injection": "linear", "init": "noise", "norm": True, "conditioning": "table"},
    {"injection": "gate", "residual": "euler", "conditioning": "sinusoidal", "init": "learned"},
    {"injection": "convex", "residual": "laurel", "rank": 3, "layer_scalars": "increment", "conditioning": "time"},
    {"layer_scalars": "stream", "residual": "laurel"},
)


def slow_hidden(model, policy, pieces, ran=None):
    """[B, T, d] from one slow decoder per sequence; `pieces` of tokens [B, T_i], `ran[i][b]` loops of each stage."""
    rows = []
    for b in range(len(pieces[0])):
        slow = SlowDecoder(model, KVPolicy.parse(policy))
        with torch.no_grad():
            parts = [slow.run(p[b].tolist(), None if ran is None else ran[i][b]) for i, p in enumerate(pieces)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("glue", GLUES)
def test_the_slow_decoder_is_the_decoder(glue):
    """One pass over everything, where no policy matters."""
    model, tokens = noisy(looped("1x1,2x3,1x1", **glue)), torch.randint(0, 37, (2, 6))
    torch.testing.assert_close(model(tokens), slow_hidden(model, "full", [tokens]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("glue", GLUES[2:5])
def test_every_policy(policy, glue):
    """A prompt, more tokens on top of it at once, then one by one."""
    model, tokens = noisy(looped("1x1,2x4,1x1", **glue)), torch.randint(0, 37, (2, 11))
    cache = model.new_cache(2, 11, policy)
    pieces = tokens.split((4, 3, 1, 1, 1, 1), dim=1)
    with torch.no_grad():
        found = torch.cat([model(piece, cache) for piece in pieces], dim=1)
    torch.testing.assert_close(found, slow_hidden(model, policy, pieces), rtol=1e-9, atol=1e-9)
    whole = model(tokens).detach()
    same = policy in ("full", "latest-available", "window-50")
    assert torch.allclose(found, whole, rtol=1e-9, atol=1e-9) == same


@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("test", [Scripted, ScriptedByLogits])
def test_every_policy_with_tokens_that_exit_early(policy, compact, test):
    model, tokens = noisy(looped("1x1,1x5,1x1", **GLUES[2])), torch.randint(0, 37, (3, 8))
    cache = model.new_cache(3, 8, policy)
    pieces = tokens.split((4, 1, 1, 1, 1), dim=1)
    script = ((5, 5, 5), (1, 3, 5), (2, 2, 2), (4, 1, 9), (5, 2, 3))
    exits = test(script=script, prefill=True)
    found = [adaptive_pass(model, piece, cache, exits, compact=compact) for piece in pieces]
    ran = [[[min(n, 5)] for n in row] for row in script]
    assert [p.loops.tolist() for p in found] == ran
    want = slow_hidden(model, policy, pieces, ran)
    torch.testing.assert_close(torch.cat([p.hidden for p in found], 1), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compact", [True, False])
def test_a_prompt_that_exits_early(compact):
    """The last position decides for all of a sequence's prompt."""
    model, tokens = noisy(looped("1x1,1x4")), torch.randint(0, 37, (3, 6))
    pieces = tokens.split((4, 1, 1), dim=1)
    for policy in POLICIES[1:]:
        cache, script = model.new_cache(3, 6, policy), ((2, 4, 1), (3, 1, 4), (4, 4, 4))
        exits = Scripted(script=script, prefill=True)
        found = torch.cat([adaptive_pass(model, p, cache, exits, compact=compact).hidden for p in pieces], 1)
        want = slow_hidden(model, policy, pieces, [[[n] for n in row] for row in script])
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_several_looped_stages():
    model, tokens = noisy(looped("1x2,1x1,1x3")), torch.randint(0, 37, (2, 6))
    pieces = tokens.split((4, 1, 1), dim=1)
    cache = model.new_cache(2, 6, "last")
    # A pass asks the test once for each stage.
    exits = Scripted(script=((2, 1), (1, 3), (1, 2), (2, 2)))
    found = [adaptive_pass(model, piece, cache, exits) for piece in pieces]
    ran = [[[2, 3], [2, 3]], [[2, 1], [1, 3]], [[1, 2], [2, 2]]]
    assert [p.loops.tolist() for p in found] == ran
    want = slow_hidden(model, "last", pieces, ran)
    torch.testing.assert_close(torch.cat([p.hidden for p in found], 1), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("glue", GLUES)
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_generation_with_a_full_cache_is_full_recomputation(glue, temperature):
    model, prompt = noisy(looped(**glue)), torch.randint(0, 37, (3, 5))
    options = {"temperature": temperature, "seed": 3}
    cached = generate(model, prompt, 12, **options)
    assert torch.equal(cached, generate(model, prompt, 12, **options, use_cache=False))
    with torch.no_grad():
        cache = model.new_cache(3, 17)
        steps = [model(piece, cache) for piece in cached.split((5, *[1] * 12), dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), model(cached), rtol=1e-9, atol=1e-9)


def test_gradients_on_top_of_a_cache():
    """Those of the new positions: what an earlier pass has stored is constant."""
    model, tokens = noisy(looped(injection="add")), torch.randint(0, 37, (1, 7))
    cache, slow = model.new_cache(1, 7, "last"), SlowDecoder(model, KVPolicy("last"))
    with torch.no_grad():
        model(tokens[:, :4], cache)
        slow.run(tokens[0, :4].tolist())
    parameters = list(model.parameters())
    found = torch.autograd.grad(model(tokens[:, 4:], cache).sin().sum(), parameters)
    want = torch.autograd.grad(slow.run(tokens[0, 4:].tolist()).sin().sum(), parameters)
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("loops", [1, 2, 7])
def test_other_numbers_of_loops(loops):
    model, tokens = noisy(looped(injection="add")), torch.randint(0, 37, (2, 5))
    assert not torch.allclose(model(tokens), model(tokens, loops=loops))
    slow = [SlowDecoder(model, KVPolicy("full"), loops).run(row.tolist()) for row in tokens]
    torch.testing.assert_close(model(tokens, loops=loops), torch.stack(slow), rtol=1e-9, atol=1e-9)
    assert torch.equal(model(tokens, loops=[loops]), model(tokens, loops=loops))
    found = generate_with_loops(model, tokens, 6, loops=loops)
    assert torch.equal(found.tokens, generate(model, tokens, 6, loops=loops, use_cache=False))
    assert found.loops.tolist() == [[[loops]] * 6] * 2


@pytest.mark.parametrize(
    ("policy", "slots"),
    [("full", 12), ("latest-available", 12), ("last", 1), ("cyclic-3", 3), ("cyclic-20", 12), ("block-5", 3)],
)
def test_memory_of_a_token(policy, slots):
    """L k 2 n_kv d_h bytes for the looped stage, in the slots that are kept; plain layers have one each."""
    model = Decoder(looped("2x1,3x12,1x1"), dtype=torch.bfloat16)
    cache = model.new_cache(4, 20, policy)
    per_slot = 2 * BASE.num_kv_heads * BASE.head_size * 2
    assert cache.bytes_per_token == (slots * 3 + 3) * per_slot
    assert cache.nbytes == 4 * 20 * cache.bytes_per_token
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == cache.nbytes


def test_memory_of_a_window():
    cache = Decoder(looped("2x1,3x12,1x1"), dtype=torch.bfloat16).new_cache(4, 20, "window-5")
    per_slot = 2 * BASE.num_kv_heads * BASE.head_size * 2
    assert cache.bytes_per_token == (3 + 3) * per_slot
    assert cache.nbytes == 4 * (20 * cache.bytes_per_token + 11 * 3 * 5 * per_slot)


def test_last_keeps_a_quarter_of_four_loops():
    """The figure of the paper that shares the last loop's cache among its four."""
    full, last = (Decoder(looped("3x4")).new_cache(1, 8, policy).nbytes for policy in ("full", "last"))
    assert full == 4 * last


def test_a_cache_of_another_kind_is_refused():
    model, tokens = noisy(looped()), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cache must be for \(1, 4, 1\) loops of the stages, got one for \(1, 6, 1\)"):
        model(tokens, model.new_cache(2, 8, loops=6))
    with pytest.raises(ValueError, match=r"cache must be for \(1, 3, 1\) loops of the stages, got one for \(1, 4, 1\)"):
        model(tokens, model.new_cache(2, 8), loops=3)
    with pytest.raises(ValueError, match="cache must be for a batch of 2, got one for 3"):
        model(tokens, model.new_cache(3, 8))
    with pytest.raises(ValueError, match=r"stages of \(1, 1, 1\) layers, got one for .* and \(1, 2, 1\)"):
        model(tokens, noisy(looped("1x1,2x4,1x1")).new_cache(2, 8))
    with pytest.raises(ValueError, match="positions must be at most 2, got 3"):
        model(tokens, model.new_cache(2, 2))
    with pytest.raises(ValueError, match="cache must have another policy than 'full' where tokens may exit early"):
        adaptive_pass(model, tokens, model.new_cache(2, 8), Scripted())
    plain = Decoder(Decoder(looped()).config.__class__(vocab_size=37, hidden_size=16, num_heads=2, num_kv_heads=1))
    with pytest.raises(ValueError, match="adaptive_pass: model must have stack='looped', got 'plain'"):
        adaptive_pass(plain, tokens, plain.new_cache(2, 8), Scripted())
    with pytest.raises(ValueError, match="loops must be None for stack='plain', got 3"):
        plain(tokens, loops=3)


@pytest.mark.parametrize("text", ["", "all", "cyclic", "cyclic-", "block-x", "window-0", "last-2", "cyclic-0"])
def test_names_of_policies(text):
    with pytest.raises(ValueError, match=r"KVPolicy: (policy must be one of|the size of)"):
        KVPolicy.parse(text)
    assert [str(KVPolicy.parse(k.replace("S", "2").replace("R", "2").replace("W", "2"))) for k in KNOWN] == [
        "full", "latest-available", "last", "cyclic-2", "block-2", "window-2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "size", "error", "message"),
    [
        ("cyclic", 0, ValueError, "the size of cyclic must be at least 1, got 0"),
        ("window", -2, ValueError, "the size of window must be at least 1, got -2"),
        ("last", 2, ValueError, "the size of last must be 0, got 2"),
        ("lst", 0, ValueError, "policy must be one of full, .*, got 'lst'"),
        ("cyclic-2", 0, ValueError, "policy must be one of full, .*, got 'cyclic-2'"),
        ("block", 2.0, TypeError, r"size must be a whole number, got 2\.0"),
    ],
)
def test_a_policy_made_directly(kind, size, error, message):
    with pytest.raises(error, match=f"KVPolicy: {message}"):
        KVPolicy(kind, size)


def test_a_policy_of_another_type():
    with pytest.raises(TypeError, match="KVPolicy: policy must be a name or a KVPolicy, got 3"):
        KVPolicy.parse(3)
