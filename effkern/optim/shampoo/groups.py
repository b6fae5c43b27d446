"""Which parameters of a model go where, by a rule that is written down, and what became of them."""

from collections.abc import Iterable
from math import prod
from typing import Any

from torch import nn

from effkern.optim.shampoo import blocks
from effkern.optim.shampoo.optimizer import Shampoo
from effkern.optim.shampoo.options import exponents_of, sides_of
from effkern.optim.shampoo.saved import expected_shapes, state_keys
from effkern.optim.shampoo.state import wide


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    adamw: Iterable[str] = (),
    shampoo_options: dict[str, Any] | None = None,
    adamw_options: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Named parameter groups for Shampoo by this rule, the first that fits:

    1. AdamW without decay: what has fewer than two rows or columns.
    2. AdamW without decay: weights of nn.Embedding and nn.EmbeddingBag, also where an output layer shares them.
    3. AdamW with decay: names that end in one of `adamw`, for example "head.weight" of an output layer.
    4. Shampoo with decay: the rest.

    Args:
        model: its parameters that require a gradient.
        weight_decay: of groups 3 and 4.
        adamw: ends of names.
        shampoo_options, adamw_options: options of the groups, for example {"lr": 3e-4}.

    Returns:
        Groups that are not empty, with (name, parameter) pairs in "params".
    """
    tables = {id(p) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters()}
    ends = tuple(adamw)
    chosen: dict[str, list[tuple[str, nn.Parameter]]] = {"shampoo": [], "adamw": [], "adamw, no decay": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if not blocks.is_matrix(tuple(p.shape)) or id(p) in tables:
            chosen["adamw, no decay"].append((name, p))
        elif ends and name.endswith(ends):
            chosen["adamw"].append((name, p))
        else:
            chosen["shampoo"].append((name, p))
    groups: list[dict[str, Any]] = []
    for kind, params in chosen.items():
        rule, _, plain = kind.partition(", ")
        options = (shampoo_options if rule == "shampoo" else adamw_options) or {}
        if params:
            decay = 0.0 if plain else weight_decay
            groups.append({"params": params, "rule": rule, "weight_decay": decay, **options})
    return groups


def describe(optimizer: Shampoo) -> str:
    """What steps each parameter: a line per group, below it one per shape with its side, blocks and exponents."""
    lines: list[str] = []
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
        count = sum(p.numel() for p in group["params"])
        lines.append(
            f"group {number}: rule {group['rule']}, {len(group['params'])} parameters, {count:,} numbers, "
            f"lr {float(group['lr']):g} x {group.get('lr_ratio', 1.0):g}, weight decay {group['weight_decay']:g}"
        )
        kinds: dict[str, list[str]] = {}
        for name, p in zip(names, group["params"]):
            kinds.setdefault(_kind(optimizer, group, tuple(p.shape), p), []).append(name)
        for kind, members in kinds.items():
            shown = members[0] + (f" .. {members[-1]}" if len(members) > 1 else "")
            lines.append(f"  {kind}: {len(members)} ({shown})")
    lines.append(f"state: {planned_bytes(optimizer) / 2**20:.2f} MiB")
    return "\n".join(lines)


def planned_bytes(optimizer: Shampoo) -> int:
    """Bytes of state once every parameter has stepped, of whole parameters."""
    total = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            total += 4
            if not optimizer.uses_shampoo(group, p):
                total += 2 * p.numel() * p.element_size()
                continue
            size = wide(p.dtype).itemsize
            total += len(state_keys(group)) * p.numel() * size
            total += sum(prod(shape) for shape in expected_shapes(group, p).values()) * size
    return total


def _kind(optimizer: Shampoo, group: dict[str, Any], shape: tuple[int, ...], parameter: Any) -> str:
    size = "x".join(map(str, shape)) or "scalar"
    if not optimizer.uses_shampoo(group, parameter):
        return f"{size} AdamW"
    rows, cols = blocks.matrix_shape(shape)
    left, right = sides_of(group["side"], rows, cols)
    a, b = exponents_of(group, left, right)
    cuts = sum(len(c) for c in blocks.split(rows, cols, group["block_size"], left, right).values())
    used = " ".join([f"left ^-{a:g}"] * left + [f"right ^-{b:g}"] * right)
    return f"{size} Shampoo {used}, {cuts} block" + ("s" if cuts > 1 else "")
