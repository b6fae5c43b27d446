"""Config dataclasses from and to plain mappings (TOML files, JSON of checkpoints). Unknown keys are errors."""

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A config file or a stored config that does not fit; the message names file, key and rule."""


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file. Raises ConfigError naming the file."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef,import-not-found,unused-ignore]
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not valid TOML: {error}") from error


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """A table of "section.field=VALUE" items, whose values are TOML's. Raises ConfigError naming the item."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef,import-not-found,unused-ignore]
    try:
        return tomllib.loads("\n".join(settings))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"--set must be section.field=VALUE with a TOML value, got {list(settings)}: {error}"
        ) from error


def _check_type(value: Any, hint: Any, key: str, source: str) -> Any:
    """`value` as `hint`, where an int may stand for a float."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{source}: {key} must be one of {list(get_args(hint))}, got {value!r}")
        return value
    if get_origin(hint) in (types.UnionType, tuple):
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{source}: {key} must be {hint.__name__}, got {value!r}")
    return value


def overlay(base: Config, mapping: Mapping[str, Any], *, source: str = "config", prefix: str = "") -> Config:
    """A copy of the dataclass `base` with the values of `mapping`, section by section.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one that breaks a rule of its section.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{source}: {prefix.rstrip('.')} must be a table, got {mapping!r}")
    hints = get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for name, value in mapping.items():
        key = prefix + name
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {prefix + near[0]!r}?" if near else ""
            raise ConfigError(f"{source}: unknown key {key!r}{hint}")
        current = getattr(base, name)
        if is_dataclass(current):
            changes[name] = overlay(current, value, source=source, prefix=key + ".")
        else:
            changes[name] = _check_type(value, hints[name], key, source)
    try:
        return replace(base, **changes)  # type: ignore[type-var]
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{source}: {error}") from error


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"section.field": value} of a dataclass or of a nested mapping."""
    pairs = (
        config.items() if isinstance(config, Mapping) else ((f.name, getattr(config, f.name)) for f in fields(config))
    )
    flat: dict[str, Any] = {}
    for name, value in pairs:
        if is_dataclass(value) or isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def differences(stored: Mapping[str, Any], current: Any, ignore: frozenset[str] = frozenset()) -> list[str]:
    """Lines "key: stored -> current" for every field that differs, apart from `ignore`."""
    old, new = flatten(stored), flatten(current)
    keys = sorted((old.keys() | new.keys()) - ignore)
    absent = "(absent)"
    return [
        f"{k}: {old.get(k, absent)!r} -> {new.get(k, absent)!r}"
        for k in keys
        if old.get(k, absent) != new.get(k, absent)
    ]
