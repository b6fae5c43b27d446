"""What one forward pass of the model carries from layer to layer beside the hidden states.

The decoder's forward hands unknown keyword arguments to every layer: a fresh Context enters there at each pass, so that
nothing is kept in modules, and passes may be nested or run in several threads. It keeps one entry per layer, because
gradient checkpointing runs layers again, in reverse order, with the context of the pass they belong to.
"""

from typing import Any

import torch
from torch import Tensor, nn

from effkern.nn.laurel import History

KEY = "laurel_context"


class Context:
    """Histories by the layer that reads them, and the first hidden states."""

    def __init__(self) -> None:
        self._before: dict[int, History] = {0: ()}
        self._first: Tensor | None = None

    def history(self, layer: int, x: Tensor) -> History:
        """What the layer with input `x` reads of earlier ones."""
        if layer not in self._before:
            raise RuntimeError(f"apply_laurel: layer {layer} must run after layer {layer - 1}, got it alone")
        # Without gradients nothing runs again, and a whole earlier input is worth letting go.
        history = self._before[layer] if torch.is_grad_enabled() else self._before.pop(layer)
        return tuple(h.to(x.device) for h in history)

    def leave(self, layer: int, history: History) -> None:
        # Later layers are connected to the first run's tensors.
        self._before.setdefault(layer + 1, history)

    def first(self, layer: int, x: Tensor) -> Tensor:
        """The first layer's input, at the layer with input `x`."""
        if self._first is None:
            if layer:
                raise RuntimeError(f"apply_laurel: layer {layer} must run after layer 0, got it alone")
            self._first = x
        return self._first.to(x.device)


def begin(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the decoder.

    Raises:
        NotImplementedError: gradient checkpointing that runs layers without gradients at first.
    """
    layer: Any = decoder.layers[0]  # type: ignore[index]
    if layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled():
        # transformers makes a partial of torch's checkpoint.
        options = getattr(layer._gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant", True):
            rule = "be use_reentrant=False, because this variant's layers exchange more than hidden states"
            raise NotImplementedError(f"apply_laurel: gradient checkpointing must {rule}, got {options!r}")
    return args, {**kwargs, KEY: Context()}
