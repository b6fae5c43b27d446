"""Registries of the parts that a DecoderConfig names.

A part is a module class made from the config, with `count(config)` for its parameters; a stack also has
`applications(config)`, `products(config, loops)` and `stages_of(config, loops)`, and a residual is also told its place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Part = TypeVar("Part", bound=type)


class Place(NamedTuple):
    """Where a residual stands."""

    layer: int
    branch: str
    """"attn", "ffn" or "block"."""


class Carry(NamedTuple):
    """What residuals get from earlier ones, beside the stream."""

    x0: Tensor | None = None
    """The stream before the first block."""
    history: tuple[Tensor, ...] = ()
    """See effkern.nn.LaurelResidual."""


NOTHING = Carry()


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
