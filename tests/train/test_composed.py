"""Everything in one config: LAuReL residuals, a looped middle, one-sided Shampoo beside AdamW, SALT live or cached."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from effkern.models import Decoder, LaurelConfig, LoopConfig, LoopedStack
from effkern.nn import LaurelResidual
from effkern.optim import Shampoo
from effkern.train.config import OptimizerConfig, ShampooConfig, TeacherConfig
from effkern.train.log import read_log
from effkern.train.loop import Trainer, train
from effkern.train.presets import PRESETS
from effkern.train.restore import load_model, weights_digest
from effkern.train.soft_labels import LabelOptions, SoftLabelJob
from tests.train.fixtures import at

TIMES = ("tokens_per_s", "wall_s")


@pytest.fixture(scope="module", params=["live", "cached"])
def composed(request, salt, teacher, dataset, tmp_path_factory):
    """16 steps, the first 10 with teacher; loops drawn anew every step."""
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
    config = replace(salt, model=model, optimizer=optimizer, schedule=replace(salt.schedule, steps=16))
    if request.param == "cached":
        options = LabelOptions(
            method="stratified", k=4, draws=4, temperature=0.5, steps=10, batch_size=4, device="cpu", precision="fp32"
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


def test_the_preset_composes_the_demo():
    config, demo = PRESETS["demo-composed"].config, PRESETS["demo"].config
    assert (config.model.residual, config.model.loop.stages) == ("laurel", "1x1,1x2,1x1")
    assert (config.optimizer.name, config.optimizer.shampoo.side, config.schedule.mode) == ("shampoo", "auto", "salt")
    assert config.data == demo.data
    assert config.teacher == demo.teacher
