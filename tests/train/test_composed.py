"""Everything in one config: LAuReL residuals, a looped middle, one-sided Shampoo beside AdamW, SALT live or cached, on
selected data. That ranks share it is in tests/distributed/test_train.py (everything, cached)."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from effkern import cli
from effkern.data.curation.artifact import finish, open_artifact
from effkern.data.curation.choose import choose_random
from effkern.data.curation.pool import Pool
from effkern.models import Decoder, LaurelConfig, LoopConfig, LoopedStack
from effkern.nn import LaurelResidual
from effkern.optim import Shampoo
from effkern.train.config import OptimizerConfig, ShampooConfig, TeacherConfig
from effkern.train.export_hf import export_hf
from effkern.train.log import read_log
from effkern.train.loop import Trainer, train
from effkern.train.presets import PRESETS
from effkern.train.restore import load_model, weights_digest
from effkern.train.soft_labels import LabelOptions, SoftLabelJob
from tests.train.fixtures import at

TIMES = ("tokens_per_s", "wall_s")


@pytest.fixture(scope="module", params=["live", "cached"])
def composed(request, salt, teacher, dataset, tmp_path_factory):
    """16 steps, the first 10 with teacher on selected windows; loops drawn anew every step."""
    out = tmp_path_factory.mktemp(request.param)
    model = replace(
        salt.model,
        num_layers=3,
        residual="laurel",
        laurel=LaurelConfig(rank=4),
        stack="looped",
        loop=LoopConfig(stages="1x1,1x3,1x1", sample="uniform"),
    )
    optimizer = OptimizerConfig(
        name="shampoo", lr=1e-2, warmup_steps=5, shampoo=ShampooConfig(precondition_frequency=3)
    )
    pool = Pool([dataset.path], salt.data.seq_len)
    chosen = choose_random(len(pool), len(pool) // 3, seed=5).kept
    finish(out, "selection", {}, pool.inputs, {"kept": chosen}, places=pool.places)
    data, schedule = replace(salt.data, selection=str(out)), replace(salt.schedule, steps=16)
    config = replace(salt, model=model, data=data, optimizer=optimizer, schedule=schedule)
    if request.param == "cached":
        options = LabelOptions(
            method="stratified", k=4, draws=4, temperature=0.5, device="cpu", precision="fp32", batch_windows=64
        )
        SoftLabelJob(teacher, dataset.path, options).write(out / "labels")
        config = replace(config, teacher=TeacherConfig(cache=str(out / "labels"), temperature=0.5))
    return at(config, out / "run")


def curve(folder):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_log(folder / "log.jsonl")]


def test_one_config_trains_all_of_it_and_resumes_to_the_bit(composed, tmp_path):
    """Stopped in both stages, between two roots, and by the checkpoint before the switch."""
    trainer = Trainer(composed, quiet=True)
    assert isinstance(trainer.model.stack, LoopedStack)
    assert sum(isinstance(module, LaurelResidual) for module in trainer.model.modules()) == 6
    assert isinstance(trainer.optimizer, Shampoo)
    selected = set(open_artifact(composed.data.selection).load("kept").tolist())
    assert [set(trainer.order.indices(step).tolist()) <= selected for step in (0, 9, 10)] == [True, True, False]
    rules = {name: g["rule"] for g in trainer.optimizer.param_groups for name in g["param_names"]}
    core = "stack.stages.1.block.core.0."
    for name in ("attention.qkv.weight", "attention.out.weight", "mlp.gate_up.weight", "mlp_residual.laurel.down"):
        assert rules[core + name] == "shampoo"
    for name in ("embedding.weight", "norm.weight", core + "mlp_norm.weight", core + "mlp_residual.laurel.weights"):
        assert rules[name] == "adamw"
    trainer.run()
    sides = [{"left", "right"} & state.keys() for state in trainer.optimizer.state_dict()["state"].values()]
    # One factor for each of three layers' four matrices and two low-rank residuals.
    assert sum(map(len, sides)) == sum(map(bool, sides)) == 3 * (4 + 4)

    config = at(composed, tmp_path)
    for stop in (4, 12):
        part = Trainer(config, quiet=True)
        step = part.step

        def stopping(number, step=step, stop=stop):
            if number == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(number)

        part.step = stopping
        assert part.run().signum == signal.SIGTERM
    assert train(config, quiet=True).finished
    whole, resumed = trainer.model, load_model(tmp_path).model
    assert weights_digest(resumed) == weights_digest(whole)
    assert curve(tmp_path) == curve(trainer.out)

    steps = [r for r in read_log(trainer.out / "log.jsonl") if r["kind"] == "train"]
    assert [r["omega"] > 0 for r in steps] == [True] * 10 + [False] * 6
    assert all((r["divergence"] > 0) == (r["omega"] > 0) for r in steps)
    start = Decoder(composed.model, seed=composed.run.seed).state_dict()
    still = [name for name, value in whole.state_dict().items() if torch.equal(value, start[name])]
    assert not still, still
    evals = [r["loss"] for r in read_log(trainer.out / "log.jsonl") if r["kind"] == "eval"]
    assert evals[-1] < evals[0] - 0.3


def state_of(trainer):
    """Every number that a step may change."""
    held = [t for of in trainer.optimizer.state.values() for t in of.values() if isinstance(t, torch.Tensor)]
    return [t.detach().clone() for t in (*trainer.model.parameters(), *held)]


def test_a_gradient_that_is_not_finite_skips_its_step_and_nothing_else(composed, tmp_path):
    """Once in each stage, in a factor of a residual that is looped; the run goes on, and the export has its logits."""
    trainer = Trainer(at(composed, tmp_path / "run"), quiet=True)
    step, weight = trainer.step, trainer.model.stack.stages[1].block.core[0].mlp_residual.laurel.down

    def poisoned(number):
        if number not in (4, 12):
            return step(number)
        before, hook = state_of(trainer), weight.register_hook(lambda grad: grad * torch.nan)
        result, timer = step(number)
        hook.remove()
        assert not result.applied
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(trainer), strict=True))
        return result, timer

    trainer.step = poisoned
    result = trainer.run()
    assert (result.finished, result.state.skipped, result.state.nonfinite_in_a_row) == (True, 2, 0)
    steps = [r for r in read_log(result.out / "log.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in steps if not r["applied"]] == [5, 13]
    assert [r["step"] for r in steps] == list(range(1, 17))
    assert result.evals[-1]["loss"] < result.evals[0]["loss"] - 0.2


def test_what_it_has_trained_is_evaluated_exported_and_loaded(composed, tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = at(composed, tmp_path / "run", run__eval_tokens=0)
    evals = train(config, quiet=True).evals
    words = ["eval", "--checkpoint", config.run.out, "--data", config.data.path, "--device", "cpu", "--json"]
    assert cli.main([*words, "--batch-size", "4"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert [numbers[key] for key in ("loss", "accuracy")] == [evals[-1][key] for key in ("loss", "accuracy")]
    assert export_hf(config.run.out, tmp_path / "exported") == "effkern"
    own, tokens = load_model(config.run.out).model, torch.randint(0, 300, (2, 20))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True).eval()
    assert torch.equal(theirs(tokens).logits, own.logits(own(tokens)))


def test_the_preset_composes_the_demo():
    config, demo = PRESETS["demo-composed"].config, PRESETS["demo"].config
    assert (config.model.residual, config.model.loop.stages) == ("laurel", "1x1,1x2,1x1")
    assert (config.optimizer.name, config.optimizer.shampoo.side, config.schedule.mode) == ("shampoo", "auto", "salt")
    assert config.data == demo.data
    assert config.teacher == demo.teacher
