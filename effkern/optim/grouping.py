"""What each parameter of a model is, groups by that, and a table of who steps what."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from effkern.optim.lora import pairs
from effkern.optim.shampoo.blocks import is_matrix

ROLES = ("matrices", "output", "embeddings", "norms", "vectors", "lora")
# A pull towards zero makes sense of what is multiplied with what it reads, not of lookups, offsets and factors of one.
DECAYED = frozenset({"matrices", "output", "lora"})
_HEADS = ("lm_head", "head")
# Their weights have the shape of what they normalize, which may be that of a matrix.
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def roles(model: nn.Module, *, output: Iterable[str] = ()) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Trainable parameters by role, in the model's order; the first that fits:

    lora        factors of LoRA layers, also of those that effkern.optim.find_pairs refuses (stacked experts)
    embeddings  of nn.Embedding and nn.EmbeddingBag, also where an output layer shares them; of tables that
                get_input_embeddings() of the model or a part of it names; rows that PEFT trains of them
    output      of the output layer: get_output_embeddings() of the model or a part of it, an nn.Linear named lm_head or
                head at the top or where wrappers (DDP, Lightning) keep the model, names that end in one of `output`
    norms       of torch's norms, and of modules whose class is called ..Norm.. and that have no matrix of their own
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
        elif isinstance(module, _NORMS) or ("Norm" in type(module).__name__ and not any(map(_is_matrix, own))):
            marks.update({id(p): "norms" for p in own})
    marks.update({id(p): "output" for p in _output(model) if _is_matrix(p)})
    if ends:
        marks.update({id(p): "output" for name, p in named if name.endswith(ends)})
    marks.update({id(p): "embeddings" for p in _embeddings(model)})
    marks.update({id(p): "lora" for p in _factors(model)})
    return marks


def _is_matrix(p: Tensor) -> bool:
    return is_matrix(tuple(p.shape))


def _named_by(model: nn.Module, getter: str) -> Iterator[nn.Module]:
    """What `getter` of the model and of every part that has it answers."""
    for module in model.modules():
        get = getattr(module, getter, None)
        try:
            layer = get() if callable(get) else None
        except (NotImplementedError, AttributeError):
            # transformers' base class has the method for parts without such a layer too.
            continue
        if isinstance(layer, nn.Module):
            yield layer


def _output(model: nn.Module) -> Iterator[nn.Parameter]:
    for layer in _named_by(model, "get_output_embeddings"):
        yield from layer.parameters()
    for top in _tops(model):
        for name in _HEADS:
            for linear in _linears(getattr(top, name, None)):
                yield from linear.parameters()


def _tops(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and as long as all parameters are in one child, that child: what DDP, compile and Lightning wrap."""
    top: nn.Module | None = model
    while top is not None:
        yield top
        children = [child for child in top.children() if next(child.parameters(), None) is not None]
        alone = len(children) == 1 and not any(True for _ in top.parameters(recurse=False))
        top = children[0] if alone else None


def _linears(layer: Any) -> Iterator[nn.Linear]:
    """A Linear, or those that PEFT's or our layer in its place holds; no other layers."""
    if isinstance(layer, nn.Linear):
        yield layer
    elif isinstance(layer, nn.ModuleDict):
        for inner in layer.values():
            yield from _linears(inner)
    elif layer is not None:
        for name in ("base_layer", "original_module", "modules_to_save"):
            yield from _linears(getattr(layer, name, None))


def _embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield from module.parameters(recurse=False)
        rows = getattr(module, "trainable_tokens_delta", None)
        if isinstance(rows, nn.ParameterDict):
            yield from rows.values()
    for layer in _named_by(model, "get_input_embeddings"):
        # Vision and audio models name what multiplies pixels or samples, which is no lookup.
        if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            yield from (p for p in layer.parameters(recurse=False) if _is_matrix(p))


def _factors(model: nn.Module) -> Iterator[Tensor]:
    """Factors of two or more dimensions, also those without a partner: who needs pairs asks for them itself."""
    for module in model.modules():
        for holder in (getattr(module, name, None) for names in pairs.NAMES for name in names):
            held = holder.parameters() if isinstance(holder, nn.Module) else [holder]
            yield from (p for p in held if isinstance(p, Tensor) and p.dim() > 1)


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
