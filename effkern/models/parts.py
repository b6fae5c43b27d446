"""Registries of the parts that a DecoderConfig names.

A part is a module class made from the config, with `count(config)` for its parameters; a stack also has
`applications(config)`. LAuReL residuals and looped stacks are entries here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

Part = TypeVar("Part", bound=type)

MLPS: dict[str, Any] = {}
RESIDUALS: dict[str, Any] = {}
STACKS: dict[str, Any] = {}


def register(registry: dict[str, Any], name: str) -> Callable[[Part], Part]:
    """Class decorator: `registry[name]` is the class. Raises ValueError if the name is taken."""

    def add(part: Part) -> Part:
        if name in registry:
            raise ValueError(f"register: name must be new, got {name!r}")
        registry[name] = part
        return part

    return add
