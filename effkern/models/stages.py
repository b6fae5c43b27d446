"""How often each group of a decoder's layers runs: "4x1,4x4,4x1"."""

import re
from typing import NamedTuple

_STAGE = re.compile(r"\s*([0-9]+)\s*x\s*([0-9]+)\s*")

_MOST = 2**31 - 1


class Stage(NamedTuple):
    """`layers` distinct layers, one after another, and that `loops` times."""

    layers: int
    loops: int

    @property
    def looped(self) -> bool:
        return self.loops > 1

    @property
    def applications(self) -> int:
        """How often a layer runs."""
        return self.layers * self.loops


def parse_stages(text: str) -> tuple[Stage, ...]:
    """The stages of "4x1,4x4,4x1": layers x loops, in order. A stage of one loop is a plain one.

    Raises:
        ValueError: the text is not of this form, or a number in it is 0 or above 2^31 - 1.
    """
    stages = []
    for part in text.split(","):
        match = _STAGE.fullmatch(part)
        if match is None:
            raise ValueError(f"stages: each must be LAYERSxLOOPS as in '4x1,4x4,4x1', got {part!r} in {text!r}")
        stage = Stage(int(match[1]), int(match[2]))
        if 0 in stage:
            raise ValueError(f"stages: layers and loops must be at least 1, got {part!r} in {text!r}")
        if max(stage) > _MOST:
            raise ValueError(f"stages: layers and loops must be at most {_MOST}, got {part!r} in {text!r}")
        stages.append(stage)
    return tuple(stages)
