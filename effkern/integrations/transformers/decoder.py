"""A decoder layer whose residual additions are LAuReLs.

One function for all families; the two forwards only differ in the order of their arguments, which is transformers'.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from effkern.integrations.transformers.context import KEY, Context
from effkern.integrations.transformers.families import Layout, norm_weight
from effkern.nn.laurel import History, LaurelResidual

PLACEMENTS = {
    "both": ("laurel_attn", "laurel_mlp"),
    "attn": ("laurel_attn",),
    "ffn": ("laurel_mlp",),
    "block": ("laurel_block",),
}


class Place(NamedTuple):
    """What a changed layer knows of itself, as its attribute `laurel_place`."""

    layer: int
    layout: Layout
    history: bool
    """Residuals read earlier ones' inputs."""
    x0: bool
    """They read the first hidden states."""


def forward_mask_first(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The layer of Llama, Mistral, Qwen2, Qwen3 and Gemma."""
    return _decode(
        self, hidden_states, attention_mask=attention_mask, position_ids=position_ids,
        past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs,
    )  # fmt: skip


def forward_mask_second(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The layer of Gemma2 and Gemma3."""
    return _decode(
        self, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
        position_ids=position_ids, past_key_values=past_key_values, **kwargs,
    )  # fmt: skip


def _decode(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    place: Place = layer.laurel_place
    context: Context | None = kwargs.pop(KEY, None)
    history: History = ()
    first: Tensor | None = None
    if place.history or place.x0:
        if context is None:
            raise RuntimeError("apply_laurel: a layer of this variant must be called by its model, got another call")
        history = context.history(place.layer, x) if place.history else ()
        first = context.first(place.layer, x) if place.x0 else None

    attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)
    attention = _norm(layer, place.layout.after_attention, attention)
    middle, normed, history = _residual(layer, "laurel_attn", attention, x, history, first, place.layout.before_mlp)
    mlp = _norm(layer, place.layout.after_mlp, layer.mlp(normed))
    if "laurel_block" in layer._modules:
        y, _, history = _residual(layer, "laurel_block", attention + mlp, x, history, first)
    else:
        y, _, history = _residual(layer, "laurel_mlp", mlp, middle, history, first)

    if place.history and context is not None:
        context.leave(place.layer, history)
    return y


def _norm(layer: nn.Module, name: str | None, x: Tensor) -> Tensor:
    return x if name is None else getattr(layer, name)(x)


def _residual(
    layer: Any, name: str, branch: Tensor, x: Tensor, history: History, first: Tensor | None, norm: str | None = None
) -> tuple[Tensor, Tensor, History]:
    """The residual `name`, or a plain one where the layer has none, and `norm` of the result (or the result again)."""
    residual: LaurelResidual | None = layer._modules.get(name)
    if residual is None:
        y = x + branch
        return y, _norm(layer, norm, y), history
    x0 = None if residual.x0_weight is None else first
    fused = None if norm is None else norm_weight(getattr(layer, norm), layer.laurel_place.layout)
    if fused is None:
        y, _, history = residual(branch, x, history, x0=x0)
        return y, _norm(layer, norm, y), history
    y, normed, history = residual(branch, x, history, x0=x0, norm_weight=fused[0], norm_eps=fused[1])
    return y, normed, history
