"""The command line: what each command prints, its exit status, and errors that name the cause in one line."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effkern import cli

for _name in ("numpy", "tokenizers", "safetensors", "tyro", "rich"):
    pytest.importorskip(_name)

ROOT = Path(__file__).resolve().parents[1]
SMALL = """
[model]
vocab_size = 300
hidden_size = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
mlp_size = 24
max_seq_len = 64
[data]
path = "{data}"
seq_len = 16
batch_size = 4
[schedule]
steps = 8
[run]
out = "{out}"
device = "cpu"
precision = "fp32"
tensorboard = false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, a dataset made of it by the CLI, a config file, and a trained run."""
    folder = tmp_path_factory.mktemp("cli")
    rng = random.Random(0)
    (folder / "text").mkdir()
    for i in range(30):
        words = rng.choices(["red", "green", "blue", "return", "value", "of"], k=200)
        (folder / "text" / f"{i}.txt").write_text(" ".join(words))
    build = ["data", "build", "--out", str(folder / "data"), "--sources", str(folder / "text"), "--vocab-size", "300"]
    assert cli.main([*build, "--val-fraction", "0.3"]) == 0
    (folder / "run.toml").write_text(SMALL.format(data=folder / "data", out=folder / "run"))
    assert cli.main(["train", "--config", str(folder / "run.toml")]) == 0
    return folder


def fails(capsys, arguments, status=1):
    """Status and the single line on stderr of a command that must fail."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.strip()


def test_train_prints_the_result_and_a_second_call_has_nothing_to_do(folder, capsys):
    assert cli.main(["train", "--config", str(folder / "run.toml")]) == 0
    printed = capsys.readouterr().out
    last = json.loads((folder / "run" / "result.json").read_text())["final"]
    assert f"validation loss {last['loss']:.4f}, accuracy {100 * last['accuracy']:.2f}%" in printed
    assert "resumed" in printed
    assert "512 tokens" in printed


def test_command_line_beats_file_beats_preset(tmp_path, capsys):
    (tmp_path / "part.toml").write_text("[data]\nseq_len = 16\n[schedule]\nsteps = 5\n")
    arguments = ["train", "--preset", "demo-teacher", "--config", str(tmp_path / "part.toml"), "--dry-run"]
    assert cli.main([*arguments, "--schedule.steps", "7"]) == 0
    # steps from the command line, seq_len from the file, batch_size from the preset.
    assert "baseline, 7 steps x 8 x 16 = 896 tokens" in capsys.readouterr().out


def test_preset_in_the_file(tmp_path, capsys):
    (tmp_path / "a.toml").write_text('preset = "paper-2.8b"\n[optimizer]\nlr = 5e-4\n')
    assert cli.main(["train", "--config", str(tmp_path / "a.toml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "2.80B parameters" in printed
    assert "unconfirmed values" in printed
    assert "teacher.temperature=0.25: from memory" in printed


def test_eval_equals_the_models_own_loss(folder, capsys):
    from effkern.data import PackedDataset, val_batches
    from effkern.train.restore import load_model

    arguments = [
        "eval",
        "--checkpoint",
        str(folder / "run"),
        "--data",
        str(folder / "data"),
        "--json",
        "--device",
        "cpu",
    ]
    capsys.readouterr()
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    model = load_model(folder / "run").model
    batches = [torch.from_numpy(b) for b in val_batches(PackedDataset(folder / "data"), 16, 64)]
    tokens = torch.cat(batches)
    expected = torch.nn.functional.cross_entropy(
        model.logits(model(tokens[:, :-1])).flatten(0, 1), tokens[:, 1:].flatten()
    )
    # bf16 products where the CPU has them.
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-3)
    assert found["tokens"] == tokens[:, 1:].numel()
    assert found["step"] == 8


def test_generate_continues_the_prompt_the_same_way_for_a_seed(folder, capsys):
    arguments = ["generate", "--checkpoint", str(folder / "run"), "--prompt", "red green", "--max-new-tokens", "12"]
    texts = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        assert cli.main([*arguments, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("red green")


def test_data_stats(folder, capsys):
    capsys.readouterr()
    assert cli.main(["data", "stats", "--path", str(folder / "data"), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["vocab_size"] <= 300
    assert sum(row["documents"] for row in numbers["splits"].values()) == 30


def test_errors_are_one_clear_line(folder, capsys, tmp_path):
    (tmp_path / "bad.toml").write_text("[optimizer]\nlrr = 1.0\n")
    message = fails(capsys, ["train", "--config", tmp_path / "bad.toml"])
    assert (
        message
        == f"effkern train: error: {tmp_path}/bad.toml: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"
    )
    assert "--preset must be one of demo" in fails(capsys, ["train", "--preset", "huge"])
    message = fails(capsys, ["train", "--data.path", tmp_path / "none", "--run.out", tmp_path / "o"])
    assert str(tmp_path / "none") in message
    assert not (tmp_path / "o").exists()
    message = fails(capsys, ["eval", "--checkpoint", tmp_path, "--data", folder / "data"])
    assert (
        message
        == f"effkern eval: error: no intact checkpoint under {tmp_path} (a run directory or a step-XXXXXXXX directory)"
    )
    message = fails(capsys, ["generate", "--checkpoint", folder / "run", "--prompt", "a", "--max-new-tokens", 100])
    assert "prompt + max_new_tokens must be at most max_seq_len=64" in message
    message = fails(capsys, ["data", "build", "--out", tmp_path / "d", "--sources", tmp_path / "nothing"])
    assert "nothing" in message


def test_a_stored_run_with_another_config_is_refused(folder, capsys):
    message = fails(capsys, ["train", "--config", folder / "run.toml", "--optimizer.lr", "0.5"])
    assert "belongs to another run; nothing was overwritten" in message
    assert "optimizer.lr: 0.001 -> 0.5" in message


def test_eval_with_another_tokenizer(folder, capsys, tmp_path):
    from effkern.data import build_dataset

    build_dataset(tmp_path / "data", [folder / "text"], vocab_size=260, val_fraction=0.3)
    message = fails(capsys, ["eval", "--checkpoint", folder / "run", "--data", tmp_path / "data"])
    assert message.startswith("effkern eval: error: data must have the tokenizer that")
    tokenizer = next((tmp_path / "data").glob("tokenizer*.json"))
    message = fails(capsys, ["generate", "--checkpoint", folder / "run", "--prompt", "a", "--tokenizer", tokenizer])
    assert message.startswith("effkern generate: error: tokenizer must be the one that")


def test_defects_keep_their_traceback(monkeypatch):
    def broken(arguments):
        raise AssertionError("a defect")

    monkeypatch.setitem(cli._COMMANDS, "demo", ("", broken))
    with pytest.raises(AssertionError, match="a defect"):
        cli.main(["demo"])


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFKERN_DEBUG", "1")
    with pytest.raises(ValueError, match="--preset must be one of"):
        cli.main(["train", "--preset", "huge"])


def test_several_processes_need_a_mode(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "distributed.mode must be ddp, fsdp or hsdp for 2 processes" in fails(capsys, ["train"])


def test_usage(capsys):
    assert cli.main(["--help"]) == 0
    assert "usage: effkern COMMAND" in capsys.readouterr().out
    assert cli.main([]) == 2
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in ("demo", "train", "eval", "generate", "data", "doctor", "bench"))
    assert "unknown command 'trian'" in fails(capsys, ["trian"], status=2)


@pytest.mark.parametrize("command", [["train"], ["eval"], ["generate"], ["demo"], ["data", "build"]])
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert f"usage: effkern {' '.join(command)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.lrr", "1"], "--optimizer.lrr"),
        (["--optimizer.lr", "-1"], "optimizer.lr must be positive, got -1.0"),
        (["--schedule.omega", "2"], "schedule.omega must be in [0, 1], got 2.0"),
        (["--schedule.mode", "salty"], "salty"),
    ],
)
def test_wrong_options_are_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_bench_without_a_checkout_explains(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "effkern" / "cli.py"))
    assert "bench needs the folder benchmarks/ of a source checkout" in fails(capsys, ["bench"])


def test_help_imports_nothing_heavy():
    """What top-level help loads beyond the package itself (which needs torch)."""
    code = (
        "import json, sys, effkern; before = set(sys.modules); from effkern import cli; cli.main(['--help']); "
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"tyro", "rich", "matplotlib", "tokenizers", "safetensors", "tensorboard", "numpy"}


def test_a_looped_model_from_the_command_line(folder, capsys):
    """Trained from a file, its loops changed for one call, its cache shrunk, and left early."""
    looped = SMALL.replace("num_layers = 1", 'num_layers = 3\nstack = "looped"')
    looped += '[model.loop]\nstages = "1x1,1x6,1x1"\ninjection = "add"\nresidual = "euler"\n'
    (folder / "looped.toml").write_text(looped.format(data=folder / "data", out=folder / "looped"))
    assert cli.main(["train", "--config", str(folder / "looped.toml")]) == 0
    arguments = ["generate", "--checkpoint", str(folder / "looped"), "--prompt", "red", "--max-new-tokens", "8"]
    arguments += ["--temperature", "0"]
    for more in ([], ["--loops", "3"], ["--kv-policy", "last"], ["--exit", "relative-change=0.5"]):
        capsys.readouterr()
        assert cli.main([*arguments, *more]) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("red")
        assert ("loops a token, with relative-change=0.5" in printed.err) == ("--exit" in more)
    assert float(printed.err.split()[0]) < 6
    assert "exit: test must be one of" in fails(capsys, [*arguments, "--exit", "kk"])
    assert "KVPolicy: policy must be one of" in fails(capsys, [*arguments, "--kv-policy", "none"])
    assert "loops must be None for stack='plain'" in fails(
        capsys, ["generate", "--checkpoint", folder / "run", "--prompt", "red", "--loops", "2", "--max-new-tokens", "8"]
    )
