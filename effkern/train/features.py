"""What an ablation switches on and off in a config, and which combinations it trains."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from effkern.models import LoopConfig
from effkern.train.config import TrainConfig
from effkern.train.mapping import overlay, read_toml

Change = Callable[[TrainConfig], TrainConfig]


@dataclass(frozen=True)
class Feature:
    """One switch. `on` keeps what the config already says of it; `off` takes it away."""

    name: str
    on: Change
    off: Change


def default_stages(layers: int) -> str:
    """The middle layers twice, a quarter of the layers (at least one) plain before and after; one or two: the last."""
    edge = max(1, layers // 4)
    if layers < 3:
        return ",".join(["1x1"] * (layers - 1) + ["1x2"])
    return f"{edge}x1,{layers - 2 * edge}x2,{edge}x1"


def _looped(config: TrainConfig) -> TrainConfig:
    if config.model.stack == "looped":
        return config
    loop = LoopConfig(stages=default_stages(config.model.num_layers))
    return replace(config, model=replace(config.model, stack="looped", loop=loop))


def _plain(config: TrainConfig) -> TrainConfig:
    return replace(config, model=replace(config.model, stack="plain", loop=LoopConfig()))


def _salt(config: TrainConfig) -> TrainConfig:
    """The config's own schedule where it is SALT's; else a teacher for 30% of the steps, the demo's share."""
    schedule = config.schedule
    if schedule.mode == "salt":
        return config
    kd_steps = max(1, round(0.3 * schedule.steps))
    return replace(config, schedule=replace(schedule, mode="salt", kd_steps=kd_steps))


def _without_teacher(config: TrainConfig) -> TrainConfig:
    schedule = replace(config.schedule, mode="baseline", transition="step", kd_steps=0, decay_start=0)
    return replace(config, schedule=schedule)


def _residual(name: str) -> Change:
    return lambda config: replace(config, model=replace(config.model, residual=name))


def _optimizer(name: Literal["adamw", "shampoo"]) -> Change:
    return lambda config: replace(config, optimizer=replace(config.optimizer, name=name))


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature("laurel", _residual("laurel"), _residual("add")),
        Feature("looped", _looped, _plain),
        Feature("shampoo", _optimizer("shampoo"), _optimizer("adamw")),
        Feature("salt", _salt, _without_teacher),
    )
}


def parse_feature(text: str) -> Feature:
    """A key of FEATURES, or "name=file.toml": the tables of a config file laid over the config.

    Raises:
        ValueError: neither.
    """
    name, equals, path = text.partition("=")
    if not equals:
        if name not in FEATURES:
            raise ValueError(f"features must be of {sorted(FEATURES)} or NAME=FILE.toml, got {text!r}")
        return FEATURES[name]
    if not name.isidentifier() or name in FEATURES or name == "base":
        raise ValueError(f"features: NAME of NAME=FILE.toml must be a new word, got {text!r}")
    table = read_toml(Path(path))
    return Feature(name, lambda config: overlay(config, table, source=path), lambda config: config)


def combinations(features: Sequence[Feature], grid: str) -> list[tuple[Feature, ...]]:
    """What is on in each arm, the first with nothing: "each": every feature alone and all together; "full": every
    subset."""
    if grid == "full":
        sizes = range(len(features) + 1)
        return [subset for size in sizes for subset in itertools.combinations(features, size)]
    alone = [(feature,) for feature in features]
    return [(), *alone, *([tuple(features)] if len(features) > 1 else [])]


def arms(config: TrainConfig, features: Sequence[Feature], grid: str = "each") -> dict[str, TrainConfig]:
    """{name: config}: "base", "laurel", "laurel+looped" ...

    Raises:
        ValueError: no feature, one given twice, another grid, or an arm that sees another number of tokens.
    """
    names = [feature.name for feature in features]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"features must be at least one, each once, got {names}")
    if grid not in ("each", "full"):
        raise ValueError(f"grid must be each or full, got {grid!r}")
    found: dict[str, TrainConfig] = {}
    for chosen in combinations(features, grid):
        arm = config
        for feature in features:
            arm = feature.on(arm) if feature in chosen else feature.off(arm)
        found["+".join(feature.name for feature in chosen) or "base"] = arm
    expected = tokens_of(found["base"])
    for name, arm in found.items():
        if tokens_of(arm) != expected:
            raise ValueError(f"features: every arm must see {expected:,} tokens, got {tokens_of(arm):,} in {name!r}")
    return found


def tokens_of(config: TrainConfig) -> int:
    """Training tokens of a run."""
    return config.schedule.steps * config.data.batch_size * config.data.seq_len
