"""Gemma 3n's own LAuReL by effkern.laurel_residual: one fused op for product pair, norm, three additions and next norm.

a  the active stream, n its norm, t attention's normed result
u = (a + t + n + RN_l(n A B)) / sqrt 2     Gemma's attention residual, LAuReL inside
RN_f(u)                                    what the MLP reads
"""

from typing import Any, TypeVar

from torch import Tensor, nn

from effkern.integrations.transformers import qkv
from effkern.integrations.transformers.find import find_decoder, require_untouched
from effkern.integrations.transformers.swap import is_bare, is_swapped, original_class, path_of, restore, swap
from effkern.ops.laurel import laurel_residual

Model = TypeVar("Model", bound=nn.Module)

_MODULE = "transformers.models.gemma3n.modeling_gemma3n"
_LAYER = f"{_MODULE}.Gemma3nTextDecoderLayer"
_NORM = f"{_MODULE}.Gemma3nRMSNorm"
_LAUREL = f"{_MODULE}.Gemma3nTextLaurelBlock"


def use_fused_laurel(model: Model, *, ride_on_qkv: bool = False, impl: str = "auto") -> Model:
    """Let effkern.laurel_residual compute Gemma 3n's LAuReL, its sum with attention, and the norm before the MLP.

    u = (a + t + n + RN_l(n A B)) / sqrt 2 and RN_f(u), with A = linear_left^T, B = linear_right^T, RN_l the
    post_laurel_norm, RN_f the pre_feedforward_layernorm, t the attention's result behind its norm, a the active
    stream and n its norm. float32 inside, where the library rounds after every step. No parameter moves or is added:
    the state dict is the same.

    Args:
        model: Gemma3nForCausalLM, Gemma3nTextModel, or anything with the latter inside; changed in place, before
            accelerate's device hooks and sharding.
        ride_on_qkv: n A comes out of one product with q, k and v, whose weights are joined at each call; the same
            numbers up to rounding. Layers that take keys and values from another layer join q alone. Done only where
            tokens outnumber the rows of the joined weight: below, by count of bytes, joining moves more than it
            saves. A layer whose projections are not plain linear maps without bias (LoRA, quantized), or have hooks,
            computes n A by itself.
        impl: of laurel_residual.

    A layer whose LAuReL or whose norm before the MLP was replaced or has hooks (LoRA, observers) computes as it did.

    Returns:
        `model`.

    Raises:
        ValueError: another architecture, or a model it was applied to before.

    Memory: as laurel_residual: n A and 1 number per token, besides n, a and u, which the layer keeps anyway. With
    ride_on_qkv also the joined weights, per layer, until backward.
    Source: Gemma 3n as in transformers; Menghani et al., arXiv 2411.07501.
    """
    decoder: Any = find_decoder("use_fused_laurel", model, (_LAYER,), "Gemma3n")
    require_untouched("use_fused_laurel", decoder, "remove_fused_laurel")
    for layer in decoder.layers:
        layer.laurel_impl = impl
        swap(layer, _forward)
        if ride_on_qkv:
            swap(layer.self_attn, qkv.forward)
    return model


def remove_fused_laurel(model: Model) -> Model:
    """Undo use_fused_laurel.

    Raises:
        ValueError: use_fused_laurel was not applied to `model`.
    """
    decoder: Any = find_decoder("remove_fused_laurel", model, (_LAYER,), "Gemma3n")
    if not all(is_swapped(layer) for layer in decoder.layers):
        rule = "be one that use_fused_laurel was applied to"
        raise ValueError(f"remove_fused_laurel: model must {rule}, got an unchanged {type(model).__name__}")
    for layer in decoder.layers:
        del layer.laurel_impl
        restore(layer.self_attn)
        restore(layer)
    return model


def _forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    per_layer_input: Any = None,
    shared_kv_states: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    arguments = dict(
        position_embeddings=position_embeddings, shared_kv_states=shared_kv_states, attention_mask=attention_mask,
        position_ids=position_ids, past_key_values=past_key_values, **kwargs,
    )  # fmt: skip
    if not _covered(self):
        return original_class(self).forward(self, hidden_states, per_layer_input=per_layer_input, **arguments)
    # [streams, batch, tokens, D]
    streams = self.altup.predict(hidden_states)
    active = streams[self.config.altup_active_idx]
    normed = self.input_layernorm(active)
    down_product = None
    if is_swapped(self.self_attn):
        products = qkv.products(normed, self.self_attn, self.laurel.linear_left)
        if products is not None:
            arguments[qkv.KEY], down_product = products
    attention, _ = self.self_attn(hidden_states=normed, **arguments)
    middle, mlp_input = _residual(self, self.post_attention_layernorm(attention), normed, active, down_product)
    mlp = self.post_feedforward_layernorm(self.mlp(mlp_input))
    corrected = self.altup.correct(streams, middle + mlp)
    return _add_per_layer_input(self, corrected, per_layer_input)


def _residual(
    layer: Any, attention: Tensor, normed: Tensor, active: Tensor, down_product: Tensor | None
) -> tuple[Tensor, Tensor]:
    laurel, norm = layer.laurel, layer.pre_feedforward_layernorm
    out = laurel_residual(
        attention, normed, scale=2**-0.5, addends=(active,),
        down=laurel.linear_left.weight.t() if down_product is None else None, past=down_product,
        up=laurel.linear_right.weight.t(), low_rank_norm=laurel.post_laurel_norm.weight,
        low_rank_eps=laurel.post_laurel_norm.eps, norm_weight=norm.weight, norm_eps=norm.eps, impl=layer.laurel_impl,
    )  # fmt: skip
    assert out.normed is not None
    return out.y, out.normed


def _add_per_layer_input(layer: Any, streams: Tensor, per_layer_input: Tensor) -> Tensor:
    """The layer's own embedding of the token, gated by the corrected active stream, for all streams but the first."""
    first = streams[layer.config.altup_active_idx].clone()
    if layer.config.altup_correct_scale:
        first = layer.altup.scale_corrected_output(first)
    gate = layer.act_fn(layer.per_layer_input_gate(first)) * per_layer_input
    streams[1:] += layer.post_per_layer_input_norm(layer.per_layer_projection(gate))
    return streams


def _covered(layer: Any) -> bool:
    laurel = layer.laurel
    parts = ((laurel, _LAUREL), (laurel.post_laurel_norm, _NORM), (layer.pre_feedforward_layernorm, _NORM))
    return all(path_of(module) == path and is_bare(module) for module, path in parts) and all(
        qkv.is_plain(linear) for linear in (laurel.linear_left, laurel.linear_right)
    )
