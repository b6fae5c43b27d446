"""Rules of LoopedBlock's arguments."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from effkern.nn.looped import parts
from effkern.nn.looped.body import OP
from effkern.nn.looped.modes import Truncated
from effkern.nn.looped.sampling import Sampler, UniformLoops


def check_loops(loops: object) -> None:
    if type(loops) is not int:
        raise TypeError(f"{OP}: loops must be a whole number or a sampler, got {loops!r}")
    if loops < 1:
        raise ValueError(f"{OP}: loops must be at least 1, got {loops}")


def check_limits(loops: int | Sampler, max_loops: int | None, mode: Any) -> None:
    """What can be known before any call."""
    if isinstance(loops, Sampler):
        # Without a limit a draw goes beyond any table some day.
        limit = loops.high if isinstance(loops, UniformLoops) else loops.limit
        name, most = "loops of the sampler", float("inf") if limit is None else limit
    else:
        name, most = "loops", loops
        if isinstance(mode, Truncated):
            require("mode", mode, mode.loops <= loops, f"have at most the block's {loops} loops")
    if max_loops is not None:
        require(name, most, most <= max_loops, f"be at most max_loops={max_loops}")


def check_kinds(kinds: dict[str, str]) -> None:
    known = {
        "init": parts.STARTS, "injection": parts.INJECTIONS, "residual": parts.RESIDUALS,
        "conditioning": parts.CONDITIONINGS, "layer_scalars": parts.SCALARS,
    }  # fmt: skip
    for name, kind in kinds.items():
        require(name, kind, kind in known[name], f"be one of {known[name]}")


def check_sizes(
    kinds: dict[str, str], dim: Any, rank: Any, substeps: Any, max_loops: int | None, layered: bool, norm: bool
) -> None:
    """What the chosen parts need to know."""
    wide = {
        "init": kinds["init"] == "learned", "injection": kinds["injection"] in ("linear", "gate", "convex"),
        "residual": kinds["residual"] == "laurel", "conditioning": kinds["conditioning"] != "none", "norm": norm,
    }  # fmt: skip
    for name, needed in wide.items():
        require("dim", dim, not needed or (type(dim) is int and dim >= 1), f"be given for this {name}")
    scalars = kinds["layer_scalars"] != "none"
    for name, needed in (("conditioning", kinds["conditioning"] == "table"), ("layer_scalars", scalars)):
        require("max_loops", max_loops, not needed or max_loops is not None, f"be given for this {name}")
    if scalars:
        require("core", "one module", layered, "be a list of layers for layer_scalars")
    if kinds["residual"] == "laurel" and dim is not None:
        require("rank", rank, type(rank) is int and 0 <= rank <= dim, f"lie in [0, D={dim}]")
    if substeps is not None:
        require("substeps", substeps, kinds["residual"] == "euler", 'come with residual="euler"')
        require("substeps", substeps, type(substeps) is int and substeps >= 1, "be at least 1")


def check_norm(norm: object, eps: object) -> None:
    if not isinstance(norm, (bool, nn.Module)):
        raise TypeError(f"{OP}: norm must be True, False or a module, got {norm!r}")
    if type(eps) not in (int, float):
        raise TypeError(f"{OP}: norm_eps must be a number, got {eps!r}")
    require("norm_eps", eps, 0 < eps < float("inf"), "be a number above 0")  # type: ignore[operator]


def check_per_layer(per_layer: object) -> None:
    if per_layer is None:
        return
    if not isinstance(per_layer, dict):
        raise TypeError(f"{OP}: per_layer must be a dict of names and values, got {type(per_layer).__name__}")
    for name, values in per_layer.items():
        if not _nested(values):
            what = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"{OP}: per_layer[{name!r}] must be values[t][i], of loops and layers, got {what}")


def _nested(values: Any) -> bool:
    """Whether values[t][i] can be."""
    if isinstance(values, Tensor):
        return values.dim() >= 2
    if not isinstance(values, Sequence) or isinstance(values, str):
        return False
    return all(
        row.dim() >= 1 if isinstance(row, Tensor) else isinstance(row, Sequence) and not isinstance(row, str)
        for row in values
    )


def check_state(state: object, x: Tensor) -> None:
    if not isinstance(state, Tensor) or not state.is_floating_point():
        got = state.dtype if isinstance(state, Tensor) else type(state).__name__
        raise TypeError(f"{OP}: state must be a tensor of a floating dtype, got {got}")
    if state.shape != x.shape:
        raise ValueError(f"{OP}: state must have x's shape {tuple(x.shape)}, got {tuple(state.shape)}")


def check_time_steps(time_steps: Sequence[float], count: int, timed: bool) -> list[float]:
    try:
        steps = [float(s) for s in time_steps]
    except (TypeError, ValueError):
        raise TypeError(f"{OP}: time_steps must be a sequence of numbers, got {time_steps!r}") from None
    require("time_steps", time_steps, timed, 'come with conditioning="time" or residual="euler"')
    require("time_steps", time_steps, len(steps) == count, f"have one entry for each of {count} loops")
    require("time_steps", time_steps, all(s > 0 for s in steps), "be positive")
    require("time_steps", time_steps, abs(sum(steps) - 1) < 1e-4, "have the sum 1")
    return steps


def require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{OP}: {name} must {rule}, got {value!r}")
