"""Where the decoder layers of a model are."""

from collections.abc import Container

from torch import nn

from effkern.integrations.transformers.swap import is_patched, is_swapped, path_of


def find_decoder(op: str, model: nn.Module, layers: Container[str], names: str) -> nn.Module:
    """The module inside `model` that holds `layers` of the classes wanted, none of them changed yet or all.

    Args:
        layers: paths of classes. names: what they are called in an error.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = []
    for module in model.modules():
        stack = getattr(module, "layers", None)
        if isinstance(stack, nn.ModuleList) and len(stack) and all(path_of(layer) in layers for layer in stack):
            found.append(module)
    if len(found) != 1:
        rule = f"hold one stack of decoder layers of transformers' {names}"
        raise ValueError(f"{op}: model must {rule}, got {type(model).__name__} with {len(found)}")
    return found[0]


def require_untouched(op: str, decoder: nn.Module, undo: str) -> None:
    """
    Raises:
        ValueError: `op` was done before, or something else replaced a layer's forward.
    """
    for i, layer in enumerate(decoder.layers):  # type: ignore[arg-type]
        if is_swapped(layer):
            raise ValueError(f"{op}: model must be unchanged ({undo} first), got one it was applied to before")
        if is_patched(layer):
            rule = "have its class's forward (apply before accelerate's hooks and other patches)"
            raise ValueError(f"{op}: layers[{i}] must {rule}, got one of its own")
