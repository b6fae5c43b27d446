"""Where a config of the command line starts: a preset, then a config file; the command line itself comes last."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from effkern.train.config import TrainConfig
from effkern.train.mapping import overlay, read_toml
from effkern.train.presets import Preset, get_preset


class Start(NamedTuple):
    """The config below the command line, and where it came from."""

    base: TrainConfig
    preset: str
    config: str
    chosen: Preset | None


def starting_point(arguments: Sequence[str], preset: str = "") -> Start:
    """What --preset (or a file's own) and --config of `arguments` give; with neither, `preset`.

    Raises:
        ValueError: no such preset, or a file that does not fit.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="")
    first.add_argument("--config", default="")
    known, _ = first.parse_known_args(arguments)
    table = read_toml(known.config) if known.config else {}
    named = known.preset or table.pop("preset", "") or ("" if known.config else preset)
    table.pop("preset", None)
    chosen = get_preset(named) if named else None
    base = overlay(chosen.config if chosen else TrainConfig(), table, source=known.config or "config")
    return Start(base, named, known.config, chosen)
