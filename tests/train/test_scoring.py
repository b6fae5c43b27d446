"""Scores of continuations against plain log-softmax, and the harness with a task of our own."""

import json
import math

import pytest
import torch

from effkern import cli
from effkern.data.tokenizer import load_encoder
from effkern.models import Decoder, DecoderConfig
from effkern.train.loop import train
from effkern.train.restore import load_model
from effkern.train.scoring import score_continuations
from tests.train.fixtures import at

MODEL = DecoderConfig(vocab_size=37, vocab_multiple=8, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
                      mlp_size=24, max_seq_len=12, init_std=0.5)  # fmt: skip


def alone(model, context, continuation):
    """One pair at a time, with the whole row of probabilities."""
    row = torch.tensor([[*context, *continuation][-(model.config.max_seq_len + 1) :]])
    log_p = model.logits(model(row[:, :-1])).double().log_softmax(-1)[0, -len(continuation) :]
    targets = row[0, -len(continuation) :]
    total = log_p.gather(1, targets[:, None]).sum().item()
    return total, bool((log_p.argmax(-1) == targets).all())


@torch.no_grad()
def test_scores_are_those_of_each_pair_alone():
    model = Decoder(MODEL, seed=1).eval()
    lengths = [(1, 1), (3, 2), (11, 1), (5, 7), (30, 4), (1, 12), (2, 3)]
    pairs = [(torch.randint(0, 37, (a,)).tolist(), torch.randint(0, 37, (b,)).tolist()) for a, b in lengths]
    # A continuation that is the most likely one.
    context = [3, 5]
    pairs.append((context, [model.logits(model(torch.tensor([context])))[0, -1].argmax().item()]))
    for batch in (1, 3, 8):
        found = score_continuations(model, pairs, batch_size=batch)
        for score, pair in zip(found, pairs):
            total, greedy = alone(model, *pair)
            assert score.log_likelihood == pytest.approx(total, rel=1e-5)
            assert score.greedy is greedy
        assert found[-1].greedy
        assert not all(score.greedy for score in found)


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], [2] * 13)])
def test_pairs_without_context_or_too_long_are_named(context, continuation):
    with pytest.raises(ValueError, match="a continuation of 1 to max_seq_len=12"):
        score_continuations(Decoder(MODEL).eval(), [(context, continuation)])


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored")
    train(at(base, out, schedule__steps=30), quiet=True)
    return out


def test_eval_prints_perplexity_and_asks_for_something_to_do(run, dataset, capsys):
    assert cli.main(["eval", "--checkpoint", str(run), "--data", str(dataset.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == math.exp(found["loss"])
    assert found["step"] == 30
    assert cli.main(["eval", "--checkpoint", str(run)]) == 1
    assert "--data, --tasks or both" in capsys.readouterr().err


def test_generate_reads_standard_input(run, capsys, monkeypatch):
    import io

    arguments = ["generate", "--checkpoint", str(run), "--max-new-tokens", "8"]
    assert cli.main([*arguments, "--prompt", "alpha beta"]) == 0
    given = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("alpha beta"))
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == given
    assert given.startswith("alpha beta")


def test_without_the_harness_the_error_names_the_extra(run, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    monkeypatch.delitem(__import__("sys").modules, "effkern.train.harness", raising=False)
    assert cli.main(["eval", "--checkpoint", str(run), "--tasks", "piqa"]) == 1
    assert "pip install 'effkern[eval]'" in capsys.readouterr().err


CHOICE = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{context}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
UNTIL = """
task: continued
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [" "], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def test_tasks_of_the_harness(run, tmp_path, capsys, monkeypatch):
    """Accuracy, perplexity and exact match of local tasks are what the model itself says."""
    pytest.importorskip("lm_eval", reason="the extra eval (lm-evaluation-harness) is not installed")
    from effkern.models import generate

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, encoder = load_model(run).model, load_encoder(run / "tokenizer.json")
    words = ["alpha", " beta", " gamma", " return", " the"]
    rows = []
    for i in range(10):
        context = " ".join(["value of list", "first second", "the item alpha"][: 1 + i % 3]) + (" x" * (8 * (i == 9)))
        ids = encoder.encode([context])[0]
        with torch.no_grad():
            scores = [alone(model, ids, encoder.encode([context + word])[0][len(ids) :])[0] for word in words]
            new = generate(model, torch.tensor([ids[-26:]]), 6, eos=encoder.eos_id)[0, len(ids[-26:]) :].tolist()
        text = encoder.tokenizer.decode(new[: new.index(0)] if 0 in new else new)
        best = scores.index(max(scores))
        # Two of ten answers are wrong on purpose.
        label = best if i > 1 else (best + 1) % len(words)
        rows.append({"context": context, "choices": words, "label": label, "answer": text.split(" ")[0] if i else "?"})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("words", CHOICE), ("text", ROLLING), ("continued", UNTIL)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    command = ["eval", "--checkpoint", str(run), "--tasks", "words", "text", "continued", "--task-dir", str(tmp_path)]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert found["words"]["acc,none"] == pytest.approx(0.8)
    assert found["continued"]["exact_match,none"] == pytest.approx(0.9)
    with torch.no_grad():
        total = sum(alone(model, [encoder.eos_id], encoder.encode([row["context"]])[0])[0] for row in rows)
    count = sum(len(row["context"].split()) for row in rows)
    assert found["text"]["word_perplexity,none"] == pytest.approx(math.exp(-total / count), rel=1e-4)
    assert cli.main([*command[:3], "--tasks", "no-such-task"]) == 1
    assert "no-such-task" in capsys.readouterr().err
