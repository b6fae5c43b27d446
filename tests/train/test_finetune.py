"""Fine-tuning runs: adapters on a frozen checkpoint, the trainer's resume and log, export, the comparison in small."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from effkern import cli
from effkern.nn.lora import inject_lora, load_lora_state_dict, lora_layers, merge_lora
from effkern.train.checkpoint import CheckpointError
from effkern.train.config import LORA_OPTIMIZERS, DistributedConfig, LoraConfig
from effkern.train.demo import DemoInterrupted
from effkern.train.finetune import DEFAULTS, FineTuner, build_lora_optimizer, finetune, finetune_config
from effkern.train.finetune_demo import FinetunePlan, render, run_finetune_demo
from effkern.train.log import read_log
from effkern.train.loop import train
from effkern.train.restore import load_model, weights_digest
from effkern.train.runs import read_run
from tests.train.fixtures import at

TIMES = ("tokens_per_s", "wall_s")


@pytest.fixture(scope="module")
def young(base, tmp_path_factory):
    """A model that has just begun to learn."""
    out = tmp_path_factory.mktemp("young")
    train(at(base, out, schedule__steps=10), quiet=True)
    return out


@pytest.fixture
def config(young, dataset, tmp_path):
    """12 steps of rank 2 on a small trained model."""

    def make(out="run", **changes):
        made = finetune_config(young, dataset.path, tmp_path / out, rank=2, steps=12, **changes)
        run = replace(made.run, device="cpu", precision="fp32", eval_every=4, eval_tokens=256, checkpoint_every=5,
                      tensorboard=False, plot=False)  # fmt: skip
        return replace(made, run=run)

    return make


def curve(out):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(out / "log.jsonl")]


def test_only_the_adapters_move_and_the_loss_falls(config, young):
    tuner = FineTuner(config(lr=1e-2), quiet=True)
    frozen = {k: v.clone() for k, v in tuner.model.state_dict().items() if "lora_" not in k}
    result = tuner.run()
    for name, value in frozen.items():
        assert torch.equal(tuner.model.state_dict()[name], value), name
    assert result.evals[-1]["loss"] < result.evals[0]["loss"] - 0.005
    # The adapters' start changes nothing, so that the first validation is the base model's.
    base = FineTuner(config("other"), quiet=True)
    assert base.validate()["loss"] == result.evals[0]["loss"]
    stored = load_file(result.out / "checkpoints" / "step-00000012" / "model.safetensors")
    assert all("lora_" in name for name in stored)


@pytest.mark.parametrize("optimizer", LORA_OPTIMIZERS)
def test_interrupted_run_goes_on_bit_for_bit(config, optimizer, monkeypatch):
    changes = {"optimizer": optimizer, "dropout": 0.1 if optimizer == "lora_rite" else 0.0}
    straight, broken = config("straight", **changes), config("broken", **changes)
    finetune(straight, quiet=True)
    real = FineTuner.step

    def interrupt(self, i):
        if i == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "step", interrupt)
        assert finetune(broken, quiet=True).signum == signal.SIGINT
    torch.manual_seed(99)
    assert finetune(broken, quiet=True).finished
    a, b = (tmp.run.out for tmp in (straight, broken))
    assert curve(Path(a)) == curve(Path(b))
    weights = [load_model(Path(x) / "merged").model for x in (a, b)]
    assert weights_digest(weights[0]) == weights_digest(weights[1])


def test_export_is_the_adapted_model(config, young, dataset):
    """merged/ is a run directory of the plain model; adapter/ put on the base gives the same one."""
    tuner = FineTuner(config(lr=1e-2), quiet=True)
    out = tuner.run().out
    loaded = load_model(out / "merged")
    assert [read_run(folder).status for folder in (out, out / "merged")] == ["finished", "finished"]
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        want = tuner.model.eval()(tokens)
        torch.testing.assert_close(loaded.model(tokens), want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(load_model(young).model(tokens), want, rtol=1e-3, atol=1e-3)
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 2, 16.0)
    again = load_model(young).model
    inject_lora(again, settings["target_modules"], rank=settings["r"], alpha=settings["lora_alpha"])
    load_lora_state_dict(again, load_file(out / "adapter" / "adapter_model.safetensors"))
    merge_lora(again)
    assert weights_digest(again) == weights_digest(loaded.model)
    # A merged model is a base like any other.
    more = finetune_config(out / "merged", dataset.path, out.with_name("more"), rank=1, steps=2)
    assert FineTuner(replace(more, run=tuner.config.run), quiet=True).base.weights_hash == loaded.weights_hash


def test_another_base_is_another_run(config, young, base, tmp_path):
    finetune(config(), quiet=True)
    train(at(base, tmp_path / "base2", schedule__steps=2, run__seed=4), quiet=True)
    wrong = config()
    wrong = replace(wrong, lora=replace(wrong.lora, checkpoint=str(tmp_path / "base2")))
    with pytest.raises(CheckpointError, match=r"belongs to another run; nothing was overwritten(.|\n)*base \(hash\): "):
        finetune(wrong, quiet=True)
    with pytest.raises(CheckpointError, match=r"lora.rank: 2 -> 3"):
        finetune(replace(config(), lora=replace(config().lora, rank=3)), quiet=True)
    with pytest.raises(CheckpointError, match=r"holds an adapter of rank 2 alone; the whole model is in .*merged"):
        load_model(config().run.out)


def test_lora_plus_and_lora_fa(config):
    """B at its own rate; A frozen, for each optimizer."""
    for optimizer in LORA_OPTIMIZERS:
        tuner = FineTuner(config(f"{optimizer}-fa", optimizer=optimizer, train_A=False), quiet=True)
        before = [layer.factors()[0].clone() for layer in lora_layers(tuner.model).values()]
        tuner.step(0)
        for layer, A in zip(lora_layers(tuner.model).values(), before):
            assert torch.equal(layer.factors()[0], A)
            assert layer.factors()[1].abs().sum() > 0
    moved = {}
    for ratio in (1.0, 4.0):
        tuner = FineTuner(config(f"plus-{ratio}", optimizer="adamw", lr_ratio=ratio), quiet=True)
        tuner.step(0)
        moved[ratio] = next(iter(lora_layers(tuner.model).values())).factors()[1].detach().abs().max()
    assert float(moved[4.0] / moved[1.0]) == pytest.approx(4, rel=1e-4)


def test_the_layer_of_the_head_s_weight_gets_no_adapter(config, base, dataset, tmp_path):
    """The loss op reads that weight. Of a model with a head of its own the embedding may have one, and it is merged."""
    with pytest.raises(ValueError, match=r"layer whose weight is the head's \(model.tie_head\), got 'embedding'"):
        FineTuner(config(targets="qkv,embedding"), quiet=True)
    train(at(base, tmp_path / "untied", schedule__steps=2, model__tie_head=False), quiet=True)

    def untied(targets):
        made = finetune_config(tmp_path / "untied", dataset.path, tmp_path / "tuned", rank=2, steps=3, targets=targets)
        return FineTuner(replace(made, run=replace(config().run, out=str(tmp_path / "tuned"))), quiet=True)

    with pytest.raises(ValueError, match=r"must not name the layer whose weight is the head's, got 'head'"):
        untied("qkv,head")
    tuner = untied("embedding,qkv")
    result = tuner.run()
    merged = load_model(result.out / "merged").model
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        want = tuner.model.eval()
        torch.testing.assert_close(merged.logits(merged(tokens)), want.logits(want(tokens)), rtol=1e-5, atol=1e-5)
    assert (merged.embedding.weight - load_model(tmp_path / "untied").model.embedding.weight).norm() > 1e-4
    assert want.new_cache(1, 8).length == 0


def test_a_layer_that_the_loss_does_not_reach_is_named(config, monkeypatch):
    tuner = FineTuner(config(), quiet=True)
    layer = lora_layers(tuner.model)["stack.blocks.0.mlp.down"]
    monkeypatch.setattr(layer, "forward", layer.base_layer.forward)
    with pytest.raises(ValueError, match=r"layers that the loss depends on, got no gradient for \['stack.blocks.0.mlp"):
        tuner.step(0)


def test_steps_that_the_optimizer_skips_are_counted(config):
    """Loss and gradients are finite here: it is the optimizer alone that finds otherwise."""
    tuner = FineTuner(config(), quiet=True)
    real = tuner.step

    def step(i):
        tuner.optimizer.found_inf = torch.tensor([float(i in (1, 2))])
        return real(i)

    tuner.step = step
    result = tuner.run()
    assert (result.state.step, result.state.skipped, int(tuner.optimizer.skipped)) == (12, 2, 2)
    records = [record for record in read_log(result.out / "log.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in records if not record["applied"]] == [2, 3]


def test_restart_removes_the_export_of_the_run_before(config, young, monkeypatch):
    finished = config("again")
    finetune(finished, quiet=True)
    other = replace(finished, run=replace(finished.run, restart=True, seed=5))
    real = FineTuner.step

    def interrupt(self, i):
        if i == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "step", interrupt)
        assert finetune(other, quiet=True).signum == signal.SIGINT
    assert not (Path(finished.run.out) / "merged").exists()
    assert not (Path(finished.run.out) / "adapter").exists()
    own = replace(config(), run=replace(config().run, out=str(young), restart=True))
    with pytest.raises(ValueError, match=r"run.out must not hold the model of lora.checkpoint, got .*young"):
        finetune(own, quiet=True)
    assert load_model(young).step == 10


def test_every_optimizer_has_defaults(config, young):
    assert set(DEFAULTS) == set(LORA_OPTIMIZERS)
    model = load_model(young).model
    inject_lora(model, ["qkv"], rank=2)
    kinds = {
        name: type(build_lora_optimizer(model, LoraConfig("x", 2, optimizer=name), DEFAULTS[name])).__name__
        for name in LORA_OPTIMIZERS
    }
    assert kinds == {"lora_rite": "LoRARite", "adamw": "AdamW", "lora_muon": "LoRAMuon", "scaled_adam": "ScaledAdam"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, r"lora.optimizer must be one of \('lora_rite', .*got 'sgd'"),
        ({"alpha": 0.0}, "lora.alpha must be positive, got 0.0"),
        ({"lr_ratio": -1.0}, "lora.lr_ratio must be positive, got -1.0"),
        ({"targets": "qkv,attn"}, r"targets must name layers of the model, got \['attn'\]; it has \['down', 'gate_up'"),
    ],
)
def test_bad_settings(config, changes, message):
    with pytest.raises(ValueError, match=message):
        FineTuner(config(**changes), quiet=True)


def test_adapters_are_trained_whole(config):
    with pytest.raises(ValueError, match=r"distributed.mode must be none or ddp to train adapters, got 'fsdp'"):
        FineTuner(replace(config(), distributed=DistributedConfig(mode="fsdp")), quiet=True)


def test_rank_and_checkpoint_belong_together(config, base):
    with pytest.raises(ValueError, match=r"lora.rank must be 0 to train a whole model .*, got 2"):
        train(config(), quiet=True)
    with pytest.raises(ValueError, match=r"lora.rank must be at least 1 to fine-tune, got 0"):
        finetune(base, quiet=True)
    with pytest.raises(ValueError, match=r"lora.checkpoint must be given exactly where lora.rank=0 is not 0, got 'x'"):
        LoraConfig(checkpoint="x")
    with pytest.raises(ValueError, match=r"lora.checkpoint must be given exactly where lora.rank=2 is not 0, got ''"):
        LoraConfig(rank=2)


def test_commands(young, dataset, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["finetune", "--checkpoint", str(young), "--data", str(dataset.path), "--out", str(out), "--rank", "2",
                 "--steps", "3", "--batch-size", "4", "--device", "cpu"]  # fmt: skip
    assert cli.main(arguments) == 0
    assert "lora_rite, rank 2, 192 tokens" in capsys.readouterr().out
    merged = str(out / "merged")
    assert cli.main(["eval", "--checkpoint", merged, "--data", str(dataset.path), "--max-tokens", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert cli.main(["generate", "--checkpoint", merged, "--prompt", "alpha", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("alpha")
    assert cli.main(["eval", "--checkpoint", str(out), "--data", str(dataset.path)]) == 1
    assert "holds an adapter of rank 2 alone" in capsys.readouterr().err


def test_a_preset_fills_in_what_is_not_given(young, dataset, tmp_path, capsys):
    common = ["finetune", "--checkpoint", str(young), "--data", str(dataset.path), "--steps", "2", "--device", "cpu"]
    stored = {}
    for name, more in (("paper-lora-rite", []), ("paper-lora-adam", ["--rank", "2", "--alpha", "4"])):
        assert cli.main([*common, "--out", str(tmp_path / name), "--preset", name, *more]) == 0
        assert f"unconfirmed in {name}: alpha=16: of the authors' example script" in capsys.readouterr().out
        config = load_model(tmp_path / name / "merged").meta
        stored[name] = (config["merged"]["lora"], config["config"]["optimizer"]["lr"])
    rite, adam = stored["paper-lora-rite"], stored["paper-lora-adam"]
    assert (rite[0]["optimizer"], rite[0]["rank"], rite[0]["alpha"], rite[1]) == ("lora_rite", 16, 16.0, 2e-4)
    assert (adam[0]["optimizer"], adam[0]["rank"], adam[0]["alpha"], adam[1]) == ("adamw", 2, 4.0, 1e-5)
    assert cli.main([*common, "--out", str(tmp_path / "no"), "--preset", "paper"]) == 1
    assert "--preset must be one of paper-lora-rite, paper-lora-adam, got 'paper'" in capsys.readouterr().err


def test_the_command_of_the_comparison(tmp_path, monkeypatch, capsys):
    from effkern.train import finetune_demo

    asked = []
    monkeypatch.setattr(
        finetune_demo, "run_finetune_demo", lambda out, seed: asked.append((out, seed)) or "what it says"
    )
    assert cli.main(["demo", "--finetune", "--out", str(tmp_path), "--seed", "3"]) == 0
    assert asked == [(tmp_path, 3)]
    assert "what it says" in capsys.readouterr().out

    def stop(out, seed):
        raise DemoInterrupted(signal.SIGTERM, out)

    monkeypatch.setattr(finetune_demo, "run_finetune_demo", stop)
    assert cli.main(["demo", "--finetune", "--out", str(tmp_path)]) == 128 + signal.SIGTERM


def test_comparison_in_small(base, young, text, tmp_path, monkeypatch):
    """A finished demo's student, two rates each; an interruption, and what the report says."""
    out = tmp_path / "demo"
    out.mkdir()
    (out / "demo.json").write_text("{}")
    shutil.copytree(young, out / "salt")
    plan = FinetunePlan({"adamw": (1e-3, 1e-2), "lora_rite": (1e-3, 1e-2)}, (str(text),), steps=6, rank=2, eval_every=3,
                        val_tokens=512)  # fmt: skip
    real = FineTuner.step

    def interrupt(self, i):
        if self.title == "lora_rite 0.001" and i == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "step", interrupt)
        with pytest.raises(DemoInterrupted):
            run_finetune_demo(out, plan=plan, quiet=True)
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "step", lambda self, i: steps.append((self.title, i)) or real(self, i))
        written = run_finetune_demo(out, plan=plan, quiet=True)
    assert steps[0] == ("lora_rite 0.001", 3)
    assert len(steps) == 3 + 6
    report = json.loads((out / "finetune.json").read_text())
    assert (out / "finetune.md").read_text() == written
    for name, runs in report["runs"].items():
        best = min(runs, key=lambda rate: runs[rate]["evals"][-1]["loss"])
        assert report["best"][name] == float(best)
        assert [e["step"] for e in runs[best]["evals"]] == [0, 3, 6]
        assert report["final"][name]["loss"] < report["final"]["student"]["loss"]
        assert f"{report['final'][name]['loss']:.4f}" in written
    gap = report["final"]["lora_rite"]["loss"] - report["final"]["adamw"]["loss"]
    assert report["rite_minus_adamw"]["difference"] == pytest.approx(gap, abs=1e-12)
    assert (out / "finetune.png").read_bytes().startswith(b"\x89PNG")
    swapped = {**report, "rite_minus_adamw": {"difference": 1.0, "validation_standard_error": 0.1}}
    assert "AdamW ends 1.0000 +- 0.1000 nats below LoRA-RITE" in render(swapped)
    swapped = {**report, "rite_minus_adamw": {"difference": -0.1, "validation_standard_error": 0.1}}
    assert "the two do not differ on this text (-0.1000 +- 0.1000 nats)" in render(swapped)
    kept = sorted((out / "finetune").glob("*-*/**/*"))
    with pytest.raises(ValueError, match=r"finetune must hold runs on \['other'\] .*, got sources \[.*; remove it"):
        run_finetune_demo(out, plan=replace(plan, sources=("other",)), quiet=True)
    assert sorted((out / "finetune").glob("*-*/**/*")) == kept
    with pytest.raises(ValueError, match=r"grid must have as many rates for each optimizer"):
        run_finetune_demo(out, plan=FinetunePlan({"adamw": (1.0,), "lora_rite": (1.0, 2.0)}), quiet=True)
