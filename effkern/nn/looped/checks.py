"""Rules of LoopedBlock's arguments."""

from collections.abc import Sequence

from effkern.nn.looped.body import OP


def check_loops(loops: object) -> None:
    if type(loops) is not int:
        raise TypeError(f"{OP}: loops must be a whole number or a sampler, got {loops!r}")
    if loops < 1:
        raise ValueError(f"{OP}: loops must be at least 1, got {loops}")


def check_time_steps(time_steps: Sequence[float], count: int, timed: bool) -> list[float]:
    steps = [float(s) for s in time_steps]
    require("time_steps", time_steps, timed, 'come with conditioning="time" or residual="euler"')
    require("time_steps", time_steps, len(steps) == count, f"have one entry for each of {count} loops")
    require("time_steps", time_steps, all(s > 0 for s in steps), "be positive")
    require("time_steps", time_steps, abs(sum(steps) - 1) < 1e-4, "have the sum 1")
    return steps


def require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{OP}: {name} must {rule}, got {value!r}")
