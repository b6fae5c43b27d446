"""Config sections, TOML overlay, differences of two configs, presets and their estimate."""

from dataclasses import asdict, replace

import pytest
import torch

from effkern.models import Decoder, DecoderConfig, count_parameters
from effkern.train.config import FREE_ON_RESUME, DataConfig, TrainConfig
from effkern.train.estimate import activation_bytes, estimate, render
from effkern.train.mapping import ConfigError, differences, overlay, read_toml
from effkern.train.presets import PRESETS, get_preset


def test_overlay_changes_what_is_named_alone():
    config = overlay(TrainConfig(), {"model": {"num_layers": 3}, "optimizer": {"lr": 1}})
    assert config == replace(
        TrainConfig(),
        model=replace(TrainConfig().model, num_layers=3),
        optimizer=replace(TrainConfig().optimizer, lr=1.0),
    )
    assert overlay(TrainConfig(), asdict(config)) == config


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"optimizer": {"lrr": 1.0}}, r"f.toml: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'\?"),
        ({"optimiser": {}}, r"f.toml: unknown key 'optimiser'; did you mean 'optimizer'\?"),
        ({"qqq": 1}, r"f.toml: unknown key 'qqq'$"),
        ({"model": {"num_layers": 2.5}}, r"f.toml: model.num_layers must be int, got 2.5"),
        ({"run": {"compile": 1}}, r"f.toml: run.compile must be bool, got 1"),
        ({"schedule": {"mode": "x"}}, r"f.toml: schedule.mode must be one of \['baseline', 'salt', 'rkd'\], got 'x'"),
        ({"model": 3}, r"f.toml: model must be a table, got 3"),
        ({"optimizer": {"lr": -1.0}}, r"f.toml: optimizer.lr must be positive, got -1.0"),
        ({"data": {"seq_len": 512}}, r"f.toml: data.seq_len must be at most model.max_seq_len=256, got 512"),
    ],
)
def test_overlay_errors(table, message):
    with pytest.raises(ConfigError, match=message):
        overlay(TrainConfig(), table, source="f.toml")


def test_toml_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"config: cannot read .*none.toml: No such file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"config: .*bad.toml is not valid TOML"):
        read_toml(tmp_path / "bad.toml")


def test_differences_name_fields_and_both_values():
    first, second = (
        TrainConfig(),
        overlay(TrainConfig(), {"optimizer": {"lr": 0.5}, "run": {"log_every": 7, "seed": 2}}),
    )
    assert differences(asdict(first), second, FREE_ON_RESUME) == ["optimizer.lr: 0.001 -> 0.5", "run.seed: 0 -> 2"]
    assert differences(asdict(first), first) == []


def test_micro_batch_must_divide():
    with pytest.raises(ValueError, match=r"data.micro_batch_size must be 0 or divide batch_size=16, got 5"):
        DataConfig(micro_batch_size=5)


def test_paper_preset_carries_the_specs_values_and_what_is_unconfirmed():
    preset = get_preset("paper-2.8b")
    config = preset.config
    assert (config.data.batch_size, config.data.seq_len, config.schedule.steps) == (2048, 1280, 208000)
    assert (config.schedule.kd_steps, config.schedule.omega, config.teacher.temperature) == (36000, 0.667, 0.25)
    assert count_parameters(config.model) == pytest.approx(2.8e9, rel=0.01)
    assert count_parameters(PRESETS[preset.teacher].config.model) == pytest.approx(1.5e9, rel=0.01)
    for field in (
        "batch_size",
        "seq_len",
        "steps",
        "omega",
        "temperature",
        "vocab_size",
        "lr",
        "warmup",
        "depth",
        "UL2",
    ):
        assert any(field in line for line in preset.unconfirmed), field
    teacher = PRESETS[preset.teacher].config.model
    text = render(estimate(config, torch.bfloat16, teacher), config, torch.bfloat16, preset.unconfirmed)
    assert all(line in text for line in preset.unconfirmed)
    # specs/salt.md, cost check: the teacher adds 3.1% over all 208K steps.
    assert "(+3.1%)" in text
    with pytest.raises(ValueError, match=r"--preset must be one of demo, .*, got 'big'"):
        get_preset("big")


@pytest.mark.parametrize("name", ["demo", "small", "paper-2.8b"])
def test_student_is_larger_than_its_teacher(name):
    preset = PRESETS[name]
    assert count_parameters(preset.config.model) > 1.5 * count_parameters(PRESETS[preset.teacher].config.model)


def test_estimate_adds_up():
    config = PRESETS["demo"].config
    teacher = PRESETS["demo-teacher"].config.model
    numbers, parameters = estimate(config, torch.float32, teacher), count_parameters(config.model)
    assert (numbers.weights, numbers.gradients, numbers.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert numbers.autocast_copies == 0
    assert estimate(config, torch.bfloat16, teacher).autocast_copies == 2 * parameters
    assert numbers.tokens == config.schedule.steps * config.data.batch_size * config.data.seq_len
    assert numbers.teacher_tokens * config.schedule.steps == numbers.tokens * config.schedule.kd_steps
    assert estimate(config, torch.float32).teacher_flops == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_formula_is_what_autograd_keeps(dtype):
    config = DecoderConfig(vocab_size=64, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, mlp_size=160)
    model = Decoder(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # Copies of weights in bf16 are counted apart; they do not grow with the tokens.
        if storage.data_ptr() not in weights and storage.nbytes() >= 2048 * 32 * dtype.itemsize:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 64, (16, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model(tokens)
        assert hidden.shape == (16, 128, 64)
    assert activation_bytes(config, tokens.numel(), dtype) == pytest.approx(sum(kept.values()), rel=0.02)
