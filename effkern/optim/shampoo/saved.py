"""What a saved state must look like to be taken over, and the order of columns that its right factors are in."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.optim.shampoo import blocks
from effkern.optim.shampoo.adamw import MOMENTS
from effkern.optim.shampoo.grafting import SECOND_MOMENT
from effkern.optim.shampoo.options import check_group, sides_of
from effkern.optim.shampoo.sharded import local

ORDER = "order"
"""Key of the dimensions whose order the columns of a right factor follow, where it is not that of the shape."""


def expected_shapes(group: dict[str, Any], parameter: Tensor) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the factors in the state of one parameter."""
    rows, cols = blocks.matrix_shape(tuple(parameter.shape))
    left, right = sides_of(group["side"], rows, cols)
    shapes: dict[str, tuple[int, ...]] = {}
    for number, ((m, n), cuts) in enumerate(blocks.split(rows, cols, group["block_size"], left, right).items()):
        for side, used, size in (("left", left, m), ("right", right, n)):
            for kind in ("", "_root") if used else ():
                shapes[f"{side}{kind}" + (f".{number}" if number else "")] = (len(cuts), size, size)
    return shapes


def state_keys(group: dict[str, Any]) -> list[str]:
    """State of a parameter's shape."""
    used = {"momentum": group["betas"][0] > 0, "second_moment": group["grafting"] in SECOND_MOMENT}
    return [key for key, holds in used.items() if holds]


def check_groups(options: Iterable[str], saved: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError where options are missing or break a rule; counts of parameters are torch's to compare."""
    for number, other in enumerate(saved):
        missing = sorted(set(options) - other.keys())
        if missing:
            raise ValueError(f"Shampoo: saved group {number} must have Shampoo's options, got none for {missing}")
        check_group(dict(other), warn=False)


def check_state(
    group: dict[str, Any],
    parameter: Tensor,
    name: str,
    state: dict[str, Any],
    *,
    uses_shampoo: bool,
    complete: bool = True,
) -> None:
    """Raises ValueError where the state of a parameter does not fit it, or (with `complete`) is not whole."""
    if not state:
        return
    shape = tuple(parameter.shape)
    factors = expected_shapes(group, parameter) if uses_shampoo else {}
    own = ("momentum", "second_moment") if uses_shampoo else MOMENTS
    shapes: dict[str, tuple[int, ...]] = {**dict.fromkeys(own, shape), **factors, "step": ()}
    if uses_shampoo:
        shapes[ORDER] = (len(shape),)
    missing = sorted(factors.keys() - state.keys())
    if missing:
        raise ValueError(f"Shampoo: state of {name} must hold {sorted(factors)}, got none for {missing}")
    # Those of the parameter's own shape first: their message says more.
    for key, value in sorted(state.items(), key=lambda item: item[0].startswith(("left", "right"))):
        if key not in shapes:
            raise ValueError(f"Shampoo: state of {name} must hold {sorted(shapes)}, got also {key!r}")
        if not isinstance(value, Tensor) or tuple(value.shape) != shapes[key]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"Shampoo: state {key!r} of {name} must have shape {shapes[key]}, got {got}")
    if complete:
        needed = {"step", *MOMENTS}
        if uses_shampoo:
            needed = {"step", *(state_keys(group) if "step" in state and state["step"] > 0 else ())}
        missing = sorted(needed - state.keys())
        if missing:
            raise ValueError(f"Shampoo: state of {name} must hold {sorted(needed)}, got none for {missing}")
    if uses_shampoo:
        _columns(group, parameter, name, state)


def _columns(group: dict[str, Any], parameter: Tensor, name: str, state: dict[str, Any]) -> Tensor | None:
    """Where each column of the matrix is in the saved right factors; None: in its place."""
    rows, cols = blocks.matrix_shape(tuple(parameter.shape))
    if parameter.dim() < 3 or not sides_of(group["side"], rows, cols)[1]:
        return None
    plain = tuple(range(parameter.dim()))
    order, now = tuple(state[ORDER].tolist()) if ORDER in state else plain, blocks.memory_order(local(parameter))
    if order == now:
        return None
    if sorted(order) != list(plain) or order[0] != 0:
        raise ValueError(f"Shampoo: state {ORDER!r} of {name} must be an order of its dimensions, got {order}")
    if cols > group["block_size"]:
        raise ValueError(
            f"Shampoo: {name} must lie in memory as when its right factors were made, as they are cut: in the order "
            f"{order} of its dimensions, got {now}"
        )
    places = torch.arange(cols).view([1] + [parameter.shape[d] for d in order[1:]])
    # Dimension d of the parameter is dimension order.index(d) of the saved matrix.
    return places.permute([order.index(d) for d in now]).flatten()


def reorder(group: dict[str, Any], parameter: Tensor, name: str, state: dict[str, Any]) -> None:
    """Bring right factors into the order that the parameter has in memory now, and note it."""
    if "step" in state:
        columns = _columns(group, parameter, name, state)
        for key in [k for k in state if k.startswith("right")] if columns is not None else ():
            here = columns.to(state[key].device)  # type: ignore[union-attr]
            state[key] = state[key][:, here][:, :, here]
    now = blocks.memory_order(local(parameter))
    if sides_of(group["side"], *blocks.matrix_shape(tuple(parameter.shape)))[1] and now != tuple(
        range(parameter.dim())
    ):
        state[ORDER] = torch.tensor(now)
    else:
        state.pop(ORDER, None)
