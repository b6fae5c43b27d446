"""Exit tests against their definitions, one sequence at a time, and what leaving early costs."""

import math

import pytest
import torch

from effkern.models import EXITS, KVPolicy, adaptive_pass, exit_test, generate, generate_with_loops
from effkern.models.exits import KL, ArgmaxStable, Cosine, Entropy, ExitTracker, GateCDF, RelativeChange
from tests.models.loop_models import Scripted, ScriptedByLogits, looped, noisy
from tests.models.slow_loops import SlowDecoder

LOOPS = 8
# A loop that settles: damped, with its input in every loop.
CONFIG = looped(f"1x1,1x{LOOPS},1x1", injection="add", residual="euler", norm=True, exit_gate=True)


def copied(slow):
    """A sequence that may go on without the first one noticing."""
    other = SlowDecoder(slow.model, slow.policy)
    other.store, other.ran, other.length, other.stages = dict(slow.store), dict(slow.ran), slow.length, slow.stages
    return other


def softmax(logits):
    shifted = [math.exp(v - max(logits)) for v in logits]
    return [v / sum(shifted) for v in shifted]


def loops_by_hand(slow, token, test):
    """Loops of the next token by the definition of `test`: lists and floats, no tensors of a batch."""
    model, outputs = slow.model, []
    for t in range(1, LOOPS + 1):
        trial = copied(slow)
        hidden = trial.run([token], [t])[-1]
        outputs.append((trial.states[1][-1][-1].tolist(), model.logits(hidden).tolist()))
    calm, stayed = 0, 1.0
    for t, (state, logits) in enumerate(outputs, 1):
        if isinstance(test, GateCDF):
            gate = model.stack.stages[1].gate
            z = sum(w * h for w, h in zip(gate.weight.tolist(), state)) + gate.bias.item()
            stayed *= 1 - 1 / (1 + math.exp(-z))
            if 1 - stayed >= test.threshold:
                return t
            continue
        if t == 1:
            continue
        before, old = outputs[t - 2]
        size, dot = math.hypot(*state), sum(a * b for a, b in zip(state, before))
        if isinstance(test, RelativeChange):
            quiet = math.dist(state, before) / size < test.threshold
        elif isinstance(test, Cosine):
            quiet = 1 - dot / size / math.hypot(*before) < test.threshold
        elif isinstance(test, ArgmaxStable):
            quiet = logits.index(max(logits)) == old.index(max(old))
        else:
            p, q = softmax(old), softmax(logits)
            h = [-sum(v * math.log(v) for v in dist) for dist in (p, q)]
            kl = sum(a * math.log(a / b) for a, b in zip(p, q))
            quiet = (abs(h[1] - h[0]) if isinstance(test, Entropy) else kl) < test.threshold
        calm = calm + 1 if quiet else 0
        if calm >= test.patience and t >= test.min_loops:
            return t
    return LOOPS


TESTS = (
    RelativeChange(0.08),
    RelativeChange(0.08, patience=2),
    Cosine(0.004),
    Entropy(0.02),
    Entropy(0.02, min_loops=5),
    KL(0.01),
    ArgmaxStable(patience=2),
    ArgmaxStable(),
    GateCDF(0.7),
)


@pytest.mark.parametrize("test", TESTS, ids=str)
@torch.no_grad()
def test_every_test_by_its_definition(test):
    """Six sequences, four tokens each: every token runs the loops that its definition says, and its hidden state."""
    model, tokens = noisy(CONFIG, size=0.15), torch.randint(0, 37, (6, 7))
    cache = model.new_cache(6, 7, "latest-available")
    slow = [SlowDecoder(model, KVPolicy("latest-available")) for _ in range(6)]
    adaptive_pass(model, tokens[:, :3], cache, test)
    for one, row in zip(slow, tokens):
        one.run(row[:3].tolist())
    seen = set()
    for i in range(3, 7):
        found = adaptive_pass(model, tokens[:, i : i + 1], cache, test)
        want = [loops_by_hand(one, int(row[i]), test) for one, row in zip(slow, tokens)]
        assert found.loops[:, 0].tolist() == want
        hidden = torch.stack([one.run([int(row[i])], [n]) for one, row, n in zip(slow, tokens, want)])
        torch.testing.assert_close(found.hidden, hidden, rtol=1e-9, atol=1e-9)
        seen |= set(want)
    assert len(seen) > 1, seen


@pytest.mark.parametrize("policy", ["latest-available", "last", "cyclic-2", "window-3"])
@pytest.mark.parametrize("test", [TESTS[0], KL(0.001), TESTS[8]], ids=str)
@torch.no_grad()
def test_generation_by_hand(policy, test):
    """Greedy, token by token, each sequence alone."""
    model, prompt = noisy(CONFIG, size=0.15), torch.randint(0, 37, (4, 4))
    found = generate_with_loops(model, prompt, 6, kv_policy=policy, exit=test)
    for b in range(4):
        slow = SlowDecoder(model, KVPolicy.parse(policy))
        tokens, ran, new = prompt[b].tolist(), [LOOPS], prompt[b].tolist()
        for i in range(6):
            hidden = slow.run(new, [ran[-1]])
            tokens.append(int(model.logits(hidden[-1]).argmax()))
            new = tokens[-1:]
            if i < 5:
                ran.append(loops_by_hand(slow, new[0], test))
        assert found.tokens[b].tolist() == tokens
        assert found.loops[b, :, 0].tolist() == ran
    assert found.loops.unique().numel() > 2


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", EXITS)
def test_compaction_changes_nothing(name, temperature):
    model, prompt = noisy(CONFIG, size=0.15), torch.randint(0, 37, (5, 4))
    options = {"exit": {"entropy": "entropy=0.02", "kl": "kl=0.01"}.get(name, name), "temperature": temperature}
    for policy in ("last", "block-3", "latest-available"):
        found = [generate_with_loops(model, prompt, 8, kv_policy=policy, compact=c, **options) for c in (True, False)]
        assert torch.equal(found[0].tokens, found[1].tokens)
        assert torch.equal(found[0].loops, found[1].loops)
        assert torch.equal(found[0].tokens, generate(model, prompt, 8, kv_policy=policy, **options))


@pytest.mark.parametrize("exits", [Scripted, ScriptedByLogits])
@torch.no_grad()
def test_the_masked_run_has_the_same_logits_and_the_same_cache(exits):
    model, tokens = noisy(CONFIG), torch.randint(0, 37, (5, 6))
    script = ((1, 8, 3, 3, 5), (8, 1, 1, 2, 2), (4, 4, 4, 4, 4))
    logits, caches = [], []
    for compact in (True, False):
        cache, test = model.new_cache(5, 6, "latest-available"), exits(script=script)
        passes = [adaptive_pass(model, t, cache, test, compact=compact) for t in tokens.split((3, 1, 1, 1), 1)]
        assert [p.loops[:, 0].tolist() for p in passes[1:]] == [list(row) for row in script]
        logits.append(model.logits(torch.cat([p.hidden for p in passes], 1)))
        caches.append(torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers]))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(caches[0], caches[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exits", [Scripted, ScriptedByLogits])
@torch.no_grad()
def test_a_sequence_that_has_left_is_not_computed(exits):
    """The looped layer sees as many rows as loops were run, all in all; without compaction all rows in every loop."""
    model, tokens = noisy(CONFIG), torch.randint(0, 37, (4, 4))
    rows = []
    model.stack.stages[1].block.core[0].mlp.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    for compact, want in ((True, [4, 3, 2, 1, 1, 1]), (False, [4] * 6)):
        cache = model.new_cache(4, 4, "last")
        adaptive_pass(model, tokens[:, :3], cache, exits())
        rows.clear()
        adaptive_pass(model, tokens[:, 3:], cache, exits(script=((1, 6, 3, 2),)), compact=compact)
        assert rows == want


@torch.no_grad()
def test_all_may_leave_at_once_or_none():
    model, tokens = noisy(CONFIG), torch.randint(0, 37, (3, 2))
    for ran in (1, LOOPS):
        cache = model.new_cache(3, 2, "latest-available")
        test = Scripted(script=((ran,) * 3,), prefill=True)
        found = adaptive_pass(model, tokens, cache, test)
        assert found.loops.tolist() == [[ran]] * 3
        other = torch.stack([SlowDecoder(model, cache.policy).run(row.tolist(), [ran]) for row in tokens])
        torch.testing.assert_close(found.hidden, other, rtol=1e-9, atol=1e-9)
    # A prompt runs all loops unless it is asked not to.
    found = adaptive_pass(model, tokens, model.new_cache(3, 2, "last"), Scripted(script=((1, 1, 1),)))
    assert found.loops.tolist() == [[LOOPS]] * 3


def test_a_state_that_is_not_finite_never_exits():
    for test in (RelativeChange(), Cosine()):
        tracker = ExitTracker(test)
        x = torch.full((2,), torch.nan) if test.reads == "change" else torch.full((2, 4), torch.nan)
        assert not any(tracker.update(x).any() for _ in range(4))


def test_names_and_defaults():
    assert [exit_test(name).threshold for name in EXITS] == [0.03, 1e-3, 1e-3, 1e-3, 0.5, 0.5]
    assert exit_test("argmax-stable").patience == 5
    assert exit_test("argmax-stable=2") == ArgmaxStable(patience=2)
    assert exit_test("kl=1e-4") == KL(1e-4)
    assert exit_test(KL(0.5)) == KL(0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exit_test("entropie"), "exit: test must be one of relative-change, .*, got 'entropie'"),
        (lambda: exit_test("kl=x"), "exit: kl must be followed by a number, got 'kl=x'"),
        (lambda: exit_test("kl="), "exit: kl must be followed by a number, got 'kl='"),
        (lambda: exit_test("kl=nan"), "KL: threshold must be positive, got nan"),
        (lambda: KL(0.0), r"KL: threshold must be positive, got 0\.0"),
        (lambda: Cosine(patience=0), "Cosine: patience must be a whole number of at least 1, got 0"),
        (lambda: Entropy(min_loops=0), "Entropy: min_loops must be a whole number of at least 1, got 0"),
        (lambda: GateCDF(1.5), r"GateCDF: threshold must lie in \(0, 1\], got 1\.5"),
    ],
)
def test_errors_of_tests(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tests_of_another_type():
    with pytest.raises(TypeError, match="exit: test must be a name, NAME=NUMBER or an ExitTest, got 5"):
        exit_test(5)
    with pytest.raises(TypeError, match="KL: threshold must be a number, got '1'"):
        KL("1")


def test_errors_of_generation():
    model, prompt = noisy(CONFIG), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="cache must have another policy than 'full'"):
        generate(model, prompt, 2, exit="kl", kv_policy="full")
    with pytest.raises(ValueError, match="use_cache must be True for exit and kv_policy, got False"):
        generate(model, prompt, 2, exit="kl", use_cache=False)
    with pytest.raises(ValueError, match=r"test must not read a gate in a decoder without loop\.exit_gate"):
        generate(noisy(looped()), prompt, 2, exit="gate-cdf")
    with pytest.raises(ValueError, match="with several looped stages, got KL, which reads logits"):
        generate(noisy(looped("1x2,1x2")), prompt, 2, exit="kl")
