"""A corpus and models so small that a run takes a second."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from effkern.data import PackedDataset, build_dataset
from effkern.models import DecoderConfig
from effkern.train.config import DataConfig, OptimizerConfig, RunConfig, ScheduleConfig, TeacherConfig, TrainConfig
from effkern.train.loop import Trainer

STEPS = 240


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Forty files of made-up sentences."""
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "value", "list", "of", "the", "first", "second", "item"]
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        lines = [" ".join(rng.choices(words, k=8)) for _ in range(40)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def dataset(text, tmp_path_factory) -> PackedDataset:
    return build_dataset(tmp_path_factory.mktemp("data") / "packed", [text], vocab_size=300, val_fraction=0.2)


@pytest.fixture(scope="session")
def base(dataset) -> TrainConfig:
    """240 steps of 4 x 16 tokens; no teacher; run.out must be set."""
    return TrainConfig(
        model=DecoderConfig(
            vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_size=24, max_seq_len=32
        ),
        data=DataConfig(path=str(dataset.path), seq_len=16, batch_size=4),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5),
        schedule=ScheduleConfig(steps=STEPS),
        run=RunConfig(
            out="",
            device="cpu",
            precision="fp32",
            eval_every=40,
            eval_tokens=256,
            checkpoint_every=7,
            tensorboard=False,
            plot=False,
        ),
    )


def at(config: TrainConfig, out: Path, **changes: object) -> TrainConfig:
    """`config` with run.out, and other fields given as section__field."""
    config = replace(config, run=replace(config.run, out=str(out)))
    for name, value in changes.items():
        section, field = name.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


@pytest.fixture(scope="session")
def teacher(base, tmp_path_factory) -> Path:
    """Run directory of a trained teacher with another width."""
    out = tmp_path_factory.mktemp("teacher")
    Trainer(at(base, out, schedule__steps=60, model__hidden_size=8, run__seed=3), quiet=True).run()
    return out


@pytest.fixture(scope="session")
def salt(base, teacher) -> TrainConfig:
    """20 steps, the teacher in the first 10."""
    return replace(
        base,
        schedule=ScheduleConfig(steps=20, mode="salt", omega=0.5, kd_steps=10),
        teacher=TeacherConfig(checkpoint=str(teacher), temperature=0.5),
    )
