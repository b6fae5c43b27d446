"""A span of a decoder's layers, run several times: loop_layers puts it in, unloop_layers takes it out.

The model calls its layers one by one, each with a mask and positions of its own. Layers of the span hand their input on
and leave themselves with their arguments in the pass's Context; the last of them then runs all loops.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effkern.integrations.transformers.families import LAYOUTS, NAMES
from effkern.integrations.transformers.find import find_decoder, require_untouched
from effkern.integrations.transformers.loop_cache import SpanCache
from effkern.integrations.transformers.swap import is_swapped, original_class, restore, swap
from effkern.nn import LoopedBlock, LoopState

Model = TypeVar("Model", bound=nn.Module)

KEY = "loop_context"
MODES = ("recompute", "full", "recompute_layer", "autograd")


class Span(NamedTuple):
    """What a looped layer knows, as its attribute `loop_span`."""

    layer: int
    start: int
    stop: int
    num_layers: int
    """Of the whole model."""
    mode: str
    block: LoopedBlock
    """Of all layers of the span. In a tuple it is no submodule: parameters stay where they are."""


def loop_layers(
    model: Model, start: int, stop: int, loops: int, *, damping: int | None = None, mode: str = "recompute"
) -> Model:
    """Run layers start ... stop - 1 of a transformers decoder `loops` times, one after another, with the same weights.

    h <- F(h)                       F: the layers start ... stop - 1
    h <- h + (F(h) - h) / damping   with damping; damping=loops is one Euler step of length 1 in `loops` parts, which a
                                    model bears without training where plain repetition hurts it

    For Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2 and Gemma3 (text), alone or under a head. No parameter is added or
    moves: the state dict stays. Every loop has its own entries in transformers' cache, behind those of the model's
    layers: (loops - 1) * (stop - start) more. Gradients of the shared weights are summed over loops in float32.

    Args:
        model: changed in place, before accelerate's device hooks and before sharding (FSDP of single layers does not
            see the loops).
        start, stop: 0 <= start < stop <= number of layers.
        loops: L >= 1.
        damping: K, a whole number of at least 1. None: plain repetition.
        mode: what is kept for backward: "recompute" the input of each loop, "full" everything, "recompute_layer" the
            input of each loop, and of each layer of one loop; "autograd" leaves it to torch. torch.compile takes
            all, but with gradients and use_cache=True fullgraph needs "full" or "autograd" (others break the graph).
            With a filled or a static cache in a pass with gradients everything is kept.

    Gradient checkpointing of transformers takes the span as one layer: it keeps the span's input alone, and backward
    runs the loops again, within it as `mode` says. Unless it is re-entrant, shared gradients are then autograd's sums.
    Recorded hidden states are the span's input for its layers but the last, attentions those of every loop.

    Returns:
        `model`.

    Raises:
        ValueError: another architecture, a model that was changed before, or an argument that breaks a rule; the model
            is then as it was. Later, in a forward pass: a cache that another span, number of loops or damping has
            filled.
        TypeError: start, stop, loops or damping is no whole number.

    Memory: see mode; the cache grows from n to n + (loops - 1) (stop - start) layers.
    Source: Saunshi et al., arXiv 2502.17416 (middle looping); training-free looping, arXiv 2605.23872.
    """
    op = "loop_layers"
    decoder: Any = find_decoder(op, model, LAYOUTS, NAMES)
    require_untouched(op, decoder, "unloop_layers or remove_laurel")
    count = len(decoder.layers)
    for name, value in (("start", start), ("stop", stop), ("loops", loops), ("damping", damping)):
        if type(value) is not int and (name, value) != ("damping", None):
            raise TypeError(f"{op}: {name} must be a whole number, got {value!r}")
    if not 0 <= start < stop <= count:
        raise ValueError(f"{op}: start, stop must be 0 <= start < stop <= {count} layers, got {start}, {stop}")
    if loops < 1:
        raise ValueError(f"{op}: loops must be at least 1, got {loops}")
    if damping is not None and damping < 1:
        raise ValueError(f"{op}: damping must be at least 1, got {damping}")
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be one of {MODES}, got {mode!r}")
    steps = [Step(decoder.layers[i]) for i in range(start, stop)]
    block = LoopedBlock(steps, loops, residual="none" if damping is None else "euler", substeps=damping)
    for i in range(start, stop):
        decoder.layers[i].loop_span = Span(i, start, stop, count, mode, block)
        swap(decoder.layers[i], _forward)
    decoder._loop_hook = decoder.register_forward_pre_hook(begin, with_kwargs=True)
    return model


def unloop_layers(model: Model) -> Model:
    """Undo loop_layers: every layer runs once.

    Start with new caches: the plain model does not look at who has filled one, and would go on from the loops' keys.

    Raises:
        ValueError: loop_layers was not applied to `model`.
    """
    decoder: Any = find_decoder("unloop_layers", model, LAYOUTS, NAMES)
    if not hasattr(decoder, "_loop_hook"):
        rule = "be one that loop_layers was applied to"
        raise ValueError(f"unloop_layers: model must {rule}, got an unchanged {type(model).__name__}")
    for layer in decoder.layers:
        if is_swapped(layer):
            del layer.loop_span
            restore(layer)
    decoder._loop_hook.remove()
    del decoder._loop_hook
    return model


def begin(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the decoder, which hands unknown keyword arguments to every layer."""
    return args, {**kwargs, KEY: Context()}


class Context:
    """The layers of the span in one pass, with their arguments. Checkpointing may leave them here twice."""

    def __init__(self) -> None:
        self._calls: dict[int, Call] = {}

    def hold(self, index: int, call: "Call") -> None:
        self._calls[index] = call

    def calls(self, span: Span) -> "list[Call]":
        missing = [i for i in range(span.start, span.stop) if i not in self._calls]
        if missing:
            raise RuntimeError(f"loop_layers: layer {missing[0]} must run before layer {span.layer}, got it alone")
        return [self._calls[i] for i in range(span.start, span.stop)]


class Call:
    """The arguments that the model has for a layer of the span in this pass."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    def of_loop(self, loop: int, index: int, cache: SpanCache | None) -> "Call":
        """Those of one loop; `index` of the layer within the span."""
        if cache is None:
            return self
        return Visit(self, loop, index, cache)

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        return self.args, self.kwargs


class Visit(Call):
    """A call with the cache entry of its loop. It asks for the entry each time it runs."""

    def __init__(self, call: Call, loop: int, index: int, cache: SpanCache) -> None:
        super().__init__(call.args, call.kwargs)
        self.loop, self.index, self.cache = loop, index, cache

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        return self.args, {**self.kwargs, "past_key_values": self.cache.of_loop(self.loop, self.index)}


class Step(nn.Module):
    """A layer of the span as LoopedBlock wants it: the library's forward, not the one that waits for the loops."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, call: Call) -> Tensor:
        args, kwargs = call.arguments()
        return original_class(self.layer).forward(self.layer, hidden_states, *args, **kwargs)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    span: Span = self.loop_span
    context: Context | None = kwargs.pop(KEY, None)
    if context is None:
        raise RuntimeError("loop_layers: a looped layer must be called by its model, got another call")
    context.hold(span.layer, Call(args, kwargs))
    if span.layer + 1 < span.stop:
        return hidden_states
    return _run(self, span, context.calls(span), hidden_states)


def _run(layer: nn.Module, span: Span, calls: list[Call], x: Tensor) -> Tensor:
    """All loops; `layer` is the last of the span."""
    block, mode, cache = span.block, span.mode, None
    loops: int = block.loops  # type: ignore[assignment]
    past = calls[0].kwargs.get("past_key_values")
    if past is not None:
        cache = SpanCache(past, span.start, span.stop, loops, span.num_layers, block.substeps)
        mode = mode if cache.may_replay else "autograd"
    each = [[call.of_loop(t, i, cache) for i, call in enumerate(calls)] for t in range(loops)]
    if not torch.is_grad_enabled():
        mode = "full"
    elif _is_checkpointed(layer) and mode != "autograd":
        return _by_checkpoints(block, x, each, again=mode != "full")
    return block(x, mode=mode, per_layer={"call": each})


def _by_checkpoints(block: LoopedBlock, x: Tensor, each: list[list[Call]], again: bool) -> Tensor:
    """Within torch's checkpoint the loops must be seen by autograd one by one."""

    def one(h: Tensor, t: int) -> Tensor:
        return block.advance(LoopState(h, x, t), per_layer={"call": each}).state

    h = x
    for t in range(len(each)):
        h = checkpoint(one, h, t, use_reentrant=False) if again else one(h, t)
    return h


def _is_checkpointed(layer: Any) -> bool:
    """Whether the library runs the layer under torch's checkpoint that is not re-entrant."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    # transformers makes a partial of torch's checkpoint.
    return not getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
