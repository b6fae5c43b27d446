"""Shampoo in the trainer: which parameter goes where, the rates, the report, and a resume to the bit."""

import shutil
from dataclasses import asdict, replace

import pytest
import torch

from effkern.models import Decoder
from effkern.optim import Shampoo
from effkern.train.config import OptimizerConfig, ShampooConfig, TrainConfig
from effkern.train.estimate import estimate, render
from effkern.train.log import read_log
from effkern.train.loop import train
from effkern.train.mapping import ConfigError, overlay
from effkern.train.optimizer import build_optimizer, set_rate
from effkern.train.restore import load_model, weights_digest
from tests.train.fixtures import at


@pytest.fixture
def shampoo(base, tmp_path) -> TrainConfig:
    chosen = ShampooConfig(side="both", lr_ratio=0.5, precondition_frequency=3, block_size=12)
    config = replace(base, optimizer=replace(base.optimizer, name="shampoo", shampoo=chosen))
    return at(config, tmp_path / "run", schedule__steps=16, run__keep_last=10, run__eval_every=0)


def test_resume_to_the_bit(shampoo, tmp_path):
    """From the checkpoint of step 7, between two roots; the report is in the log once."""
    train(shampoo, quiet=True)
    whole = tmp_path / "run"
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    for path in (again / "checkpoints").iterdir():
        if path.name > "step-00000007":
            shutil.rmtree(path)
    train(at(shampoo, again), quiet=True)
    assert weights_digest(load_model(again).model) == weights_digest(load_model(whole).model)
    records = [r for r in read_log(again / "log.jsonl") if r["kind"] == "groups"]
    assert len(records) == 1
    assert "mlp.down.weight" in "\n".join(records[0]["lines"])
    assert not torch.equal(load_model(whole).model.head_weight, Decoder(shampoo.model, seed=0).head_weight)


@pytest.mark.parametrize("tied", [True, False])
def test_groups_and_rates(tied, base):
    """Matrices of the layers at lr * lr_ratio, the output layer with decay, embedding and vectors without."""
    config = OptimizerConfig(name="shampoo", weight_decay=0.25, shampoo=ShampooConfig(lr_ratio=0.5, beta2=0.9))
    model = Decoder(replace(base.model, tie_head=tied))
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, Shampoo)
    set_rate(optimizer, 0.02)
    found = [(g["rule"], g["weight_decay"], g["lr"], set(g["param_names"])) for g in optimizer.param_groups]
    block = "stack.blocks.0."
    matrices = {"attention.qkv.weight", "attention.out.weight", "mlp.gate_up.weight", "mlp.down.weight"}
    rest = {"embedding.weight", "norm.weight", f"{block}attention_norm.weight", f"{block}mlp_norm.weight"}
    head = [] if tied else [("adamw", 0.25, 0.02, {"head.weight"})]
    assert found == [("shampoo", 0.25, 0.01, {block + m for m in matrices}), *head, ("adamw", 0.0, 0.02, rest)]
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.9)
        assert group["adamw_betas"] == (0.9, 0.95)
        assert group["exponents"] is None


def test_planned_state_is_the_state(shampoo):
    """The dry run's bytes, without memory; and its report names what it shows."""
    numbers = estimate(shampoo, torch.float32)
    model = Decoder(shampoo.model)
    optimizer = build_optimizer(model, shampoo.optimizer)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    held = sum(v.numel() * v.element_size() for state in optimizer.state.values() for v in state.values())
    assert numbers.optimizer == held
    text = render(numbers, shampoo, torch.float32)
    assert "64x16 Shampoo left ^-0.25 right ^-0.25" in text or "48x16 Shampoo left ^-0.25 right ^-0.25" in text
    assert "AdamW: 1 (embedding.weight)" in text


def test_adamw_is_as_it_was(base):
    """The same groups without names, so that older checkpoints fit; the report names them in the dry run."""
    optimizer = build_optimizer(Decoder(base.model), base.optimizer)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all("param_names" not in group for group in optimizer.param_groups)
    numbers = estimate(base, torch.float32)
    assert numbers.optimizer == 8 * numbers.parameters
    assert "group 1: AdamW" in render(numbers, base, torch.float32)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "lion"}, r"optimizer.name must be one of \['adamw', 'shampoo'\], got 'lion'"),
        ({"shampoo": {"side": "top"}}, r"optimizer.shampoo.side must be one of .* got 'top'"),
        ({"shampoo": {"lr_ratio": 0.0}}, r"optimizer.shampoo.lr_ratio must be positive, got 0.0"),
        ({"shampoo": {"precondition_frequency": 0}}, r"precondition_frequency must be at least 1, got 0"),
    ],
)
def test_config_errors(table, message):
    with pytest.raises(ConfigError, match=message):
        overlay(TrainConfig(), {"optimizer": table})


def test_config_round_trip(shampoo):
    assert overlay(TrainConfig(), asdict(shampoo)) == shampoo
