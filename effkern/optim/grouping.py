"""What each parameter of a model is, groups by that, and a table of who steps what."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from effkern.optim.lora.pairs import find_pairs
from effkern.optim.shampoo.blocks import is_matrix

ROLES = ("matrices", "output", "embeddings", "norms", "vectors", "lora")
# A pull towards zero makes sense of what is multiplied with what it reads, not of lookups, offsets and factors of one.
DECAYED = frozenset({"matrices", "output", "lora"})
_HEADS = ("lm_head", "head")


def roles(model: nn.Module, *, output: Iterable[str] = ()) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Trainable parameters by role, in the model's order; the first that fits:

    lora        factors of LoRA pairs (effkern.optim.find_pairs)
    embeddings  of nn.Embedding and nn.EmbeddingBag, also where an output layer shares them
    output      of the output layer: get_output_embeddings() of transformers' models, a Linear named lm_head or head at
                the top, and names that end in one of `output`
    norms       of modules whose class is called ..Norm..
    vectors     what has fewer than two rows or columns (biases, gates), and effkern's tables of scalars (LAuReL's
                factors, per-loop scalars and vectors)
    matrices    the rest
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    marks = _marks(model, named, tuple(output))
    found: dict[str, list[tuple[str, nn.Parameter]]] = {role: [] for role in ROLES}
    for name, p in named:
        role = marks.get(id(p)) or ("matrices" if is_matrix(tuple(p.shape)) else "vectors")
        found[role].append((name, p))
    return found


def _marks(model: nn.Module, named: list[tuple[str, nn.Parameter]], ends: tuple[str, ...]) -> dict[int, str]:
    """Roles that do not follow from shapes, by the parameter's id; what is written last counts."""
    from effkern.nn.laurel import LaurelResidual
    from effkern.nn.looped.parts import Conditioning, LayerScalars

    marks = {}
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, LaurelResidual):
            marks.update({id(p): "vectors" for p in module.scalars()})
        elif isinstance(module, (LayerScalars, Conditioning)):
            marks.update({id(p): "vectors" for p in own if p is module.table})
        elif "Norm" in type(module).__name__:
            marks.update({id(p): "norms" for p in own})
    marks.update({id(p): "output" for p in _output(model) if is_matrix(tuple(p.shape))})
    if ends:
        marks.update({id(p): "output" for name, p in named if name.endswith(ends)})
    tables = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    marks.update({id(p): "embeddings" for module in tables for p in module.parameters(recurse=False)})
    marks.update({id(p): "lora" for pair in find_pairs(model) for p in (pair.A, pair.B)})
    return marks


def _output(model: Any) -> list[nn.Parameter]:
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    layers = [layer, *(getattr(model, name, None) for name in _HEADS)]
    return [p for m in layers if isinstance(m, nn.Module) for p in m.parameters()]


def parameter_groups(
    model: nn.Module, *, weight_decay: float = 0.0, output: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Groups for any torch.optim.Optimizer, one for each role that the model has; see `roles`.

    A group holds role, params as (name, parameter) pairs, and weight_decay: that given for matrices, output and LoRA
    factors, 0 for the others.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    found = roles(model, output=output)
    groups = [
        {"role": role, "params": params, "weight_decay": weight_decay if role in DECAYED else 0.0}
        for role, params in found.items()
        if params
    ]
    if not groups:
        raise ValueError(f"parameter_groups: model must have parameters to train, got none in {type(model).__name__}")
    return groups


def describe(what: torch.optim.Optimizer | list[dict[str, Any]] | nn.Module) -> str:
    """A table of an optimizer's groups, of those of `parameter_groups`, or of a model's.

    Columns: role, what steps it (nothing yet for bare groups), parameters, numbers, learning rate, weight decay, names.
    """
    groups = parameter_groups(what) if isinstance(what, nn.Module) else what
    found = _of_optimizer(groups) if isinstance(groups, torch.optim.Optimizer) else [("", group) for group in groups]
    rows = [("role", "stepped by", "parameters", "numbers", "lr", "decay", "names")]
    for stepper, group in found:
        names, params = _members(group)
        lr = group.get("lr")
        shown = names[0] + (f" .. {names[-1]}" if len(names) > 1 else "")
        rows.append(
            (group.get("role") or ("lora" if "rank_dims" in group else "-"), group.get("rule", stepper) or "-",
             str(len(params)), f"{sum(p.numel() for p in params):,}", "-" if lr is None else f"{float(lr):g}",
             f"{group.get('weight_decay', 0.0):g}", shown)
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _of_optimizer(optimizer: Any) -> list[tuple[str, dict[str, Any]]]:
    parts = getattr(optimizer, "parts", (optimizer,))
    return [(type(part).__name__, group) for part in parts for group in part.param_groups]


def _members(group: dict[str, Any]) -> tuple[list[str], list[Any]]:
    params = list(group["params"])
    if params and isinstance(params[0], tuple):
        return [name for name, _ in params], [p for _, p in params]
    # A LoRA group has a name for each pair.
    names = group.get("param_names") or group.get("names")
    return list(names or [f"parameter {i}" for i in range(len(params))]), params
