"""Launches of the Triton kernels; float32 state, one problem per program in forward, several in backward.

Bytes that must move for a problem: forward n d + n + m d read and m written, backward as much and the same again.
A thousand problems of n = 64, d = 20 are 5 MB, 2 us at 3.35 TB/s, while each of the loops is a dependent product: what
counts is how long one loop takes, times the loops, and how many problems are at work at once. No GPU has run it yet.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from effkern.ops.looped_linear_attention.problem import Grads, Needs, Problem
from effkern.ops.looped_linear_attention.triton_backward import looped_attention_bwd_kernel
from effkern.ops.looped_linear_attention.triton_forward import looped_attention_fwd_kernel


class Launch(NamedTuple):
    """One row of a table: what serves tiles of up to `limit` features, states and queries."""

    limit: int
    rows: int
    """Examples that meet the tensor core at a time."""
    warps: int


# Chosen by what compiles without spills (tests/native/triton_resources.json). No GPU has timed them.
FORWARD = [Launch(32, 16, 2)]
BACKWARD = [Launch(16, 16, 2), Launch(32, 16, 8)]
# Examples and queries up to which "dual" runs as such; backward spills beyond.
DUAL = 16
# States that backward has in registers at once, and the most segments: 1024 loops.
SEGMENT, SEGMENTS = 32, 32
# Programs of a backward pass, each with its own sums of the parameters' gradients, and the bytes these may take.
PROGRAMS, SUM_BYTES = 512, 1 << 26


def padded(count: int) -> int:
    return max(16, triton.next_power_of_2(count))


def _launch(table: list[Launch], tiles: dict[str, int]) -> Launch:
    return next(launch for launch in table if max(tiles.values()) <= launch.limit)


def _sizes(p: Problem) -> tuple[int, int, int, int, int]:
    """batch, n, d, m, loops."""
    batch, n, d = p.x_BND.shape
    return batch, n, d, p.query_BMD.shape[1], p.loops


def _form(p: Problem) -> str:
    small = max(p.x_BND.shape[1], p.query_BMD.shape[1]) <= DUAL
    return "dual" if p.form == "dual" and small else "factors"


def tiles_of(form: str, n: int, d: int, m: int) -> dict[str, int]:
    return {"DP": padded(d), "MP": padded(m), "KP": padded(n if form == "dual" else d)}


def _flags(p: Problem) -> dict[str, Any]:
    return {
        "FORM": _form(p), "FREE": p.preconditioner.shape[0] > 1, "HAS_STEPS": p.steps_L is not None,
        "EVERY": p.every_loop, "enable_fp_fusion": True,
    }  # fmt: skip


def forward(p: Problem) -> Tensor:
    """See plain.forward."""
    batch, n, d, m, loops = _sizes(p)
    predictions = p.x_BND.new_empty((loops if p.every_loop else 1, batch, m))
    if batch == 0:
        return predictions
    tiles = tiles_of(_form(p), n, d, m)
    launch = _launch(FORWARD, tiles)
    with torch.cuda.device_of(p.x_BND):
        looped_attention_fwd_kernel[(batch,)](
            p.x_BND, p.y_BN, p.query_BMD, p.preconditioner, p.x_BND if p.steps_L is None else p.steps_L, predictions,
            batch, n, d, m, loops, **_flags(p), **tiles, ROWS=launch.rows, num_warps=launch.warps,
        )  # fmt: skip
    return predictions


def segments_of(loops: int) -> dict[str, int]:
    """Tiles of states; those of the last loops alone where all fit."""
    segment = min(SEGMENT, triton.next_power_of_2(loops))
    return {
        "SEGMENT": segment, "SEGMENTS": triton.next_power_of_2(triton.cdiv(loops, segment)),
        "LP": triton.next_power_of_2(loops),
    }  # fmt: skip


def backward(p: Problem, grad_LBM: Tensor, needs: Needs) -> Grads:
    """See plain.backward."""
    batch, n, d, m, loops = _sizes(p)
    x = p.x_BND
    layers = p.preconditioner.shape[0]
    of_parameters = layers * d * d * needs.preconditioner + loops * needs.steps
    programs = min(batch, PROGRAMS, max(1, SUM_BYTES // (4 * max(1, of_parameters))))
    of_x, of_y, of_query = (torch.empty_like(t) if needs.data else None for t in (x, p.y_BN, p.query_BMD))
    # With a matrix per loop a program adds to its sums in memory.
    grad_a = x.new_zeros((programs, layers, d, d)) if needs.preconditioner else None
    grad_steps = x.new_zeros((programs, loops)) if needs.steps else None
    tiles = tiles_of(_form(p), n, d, m)
    launch = _launch(BACKWARD, tiles)
    if batch:
        with torch.cuda.device_of(x):
            looped_attention_bwd_kernel[(programs,)](
                grad_LBM[-1], x, p.y_BN, p.query_BMD, p.preconditioner, x if p.steps_L is None else p.steps_L,
                *(x if t is None else t for t in (of_x, of_y, of_query, grad_a, grad_steps)), batch, n, d, m, loops,
                **_flags(p), OF_DATA=needs.data, OF_A=needs.preconditioner, OF_STEPS=needs.steps, **tiles,
                **segments_of(loops), ROWS=launch.rows, num_warps=launch.warps,
            )  # fmt: skip
    return Grads(
        of_x, of_y, of_query, None if grad_a is None else grad_a.sum(0),
        None if grad_steps is None else grad_steps.sum(0),
    )  # fmt: skip


def _case(kernel: Any, table: list[Launch], **flags: Any) -> tuple:
    """A call of n = 64, d = 20 or what `flags` say, as `tests.native.triton_codegen` compiles it."""
    sizes = {"n": 64, "d": 20, "m": 1, "loops": 32} | {k: v for k, v in flags.items() if k in ("n", "d", "m", "loops")}
    form = flags["FORM"]
    tiles = tiles_of(form, sizes["n"], sizes["d"], sizes["m"])
    launch = _launch(table, tiles)
    constants = {"FREE": False, "HAS_STEPS": False, "EVERY": False, **tiles, "ROWS": launch.rows}
    if kernel is looped_attention_bwd_kernel:
        constants |= {"OF_DATA": True, "OF_A": True, "OF_STEPS": False, **segments_of(sizes["loops"])}
    constants |= {k: v for k, v in flags.items() if k not in sizes}
    signature = {k: "*fp32" if k.endswith("_ptr") else "i32" for k in kernel.arg_names if k not in constants}
    return kernel, signature, constants, launch.warps


_VARIANTS: dict[str, dict[str, Any]] = {
    "factors": {"FORM": "factors"},
    "factors_every": {"FORM": "factors", "EVERY": True, "HAS_STEPS": True},
    "factors_small": {"FORM": "factors", "d": 5},
    "free": {"FORM": "factors", "FREE": True, "EVERY": True},
    "free_queries": {"FORM": "factors", "FREE": True, "EVERY": True, "m": 32},
    "dual": {"FORM": "dual", "n": 10},
    "dual_every": {"FORM": "dual", "n": 10, "EVERY": True, "HAS_STEPS": True, "m": 16},
    "loops_1024": {"FORM": "factors", "loops": 1024},
}
COMPILE_CASES = {
    **{f"fwd_{name}": _case(looped_attention_fwd_kernel, FORWARD, **v) for name, v in _VARIANTS.items()},
    **{f"bwd_{name}": _case(looped_attention_bwd_kernel, BACKWARD, **v) for name, v in _VARIANTS.items()},
    "bwd_of_parameters": _case(looped_attention_bwd_kernel, BACKWARD, FORM="factors", HAS_STEPS=True, OF_DATA=False,
                               OF_STEPS=True),
}  # fmt: skip
