"""LAuReL in pretrained or new decoders: apply_laurel puts it in, remove_laurel takes it out."""

from typing import Any, TypeVar

from torch import nn

from effkern.integrations.transformers.context import begin
from effkern.integrations.transformers.decoder import PLACEMENTS, Place, forward_mask_first, forward_mask_second
from effkern.integrations.transformers.families import LAYOUTS, NAMES
from effkern.integrations.transformers.find import find_decoder, require_untouched
from effkern.integrations.transformers.swap import is_swapped, path_of, restore, swap
from effkern.nn.laurel import VARIANTS, LaurelResidual

Model = TypeVar("Model", bound=nn.Module)


def apply_laurel(
    model: Model,
    variant: str = "rw+lr",
    *,
    rank: int = 32,
    placement: str = "both",
    look_back: int = 3,
    scalar_map: str = "softmax2",
    per_channel: bool = False,
    x0: bool = False,
    init: str = "column_orthogonal",
    save_branch: bool | None = None,
    impl: str = "auto",
) -> Model:
    """Make the residual additions of a transformers decoder learned: y = alpha f(x) + beta (x + what the variant adds).

    For Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2 and Gemma3 (text), alone or under a head. Every layer gets
    submodules effkern.nn.LaurelResidual, whose parameters are trained, saved and moved with the model's; the norm
    between attention and MLP runs fused with the residual before it. Norms of a branch (Gemma2, Gemma3) belong to f.
    With the default scalar_map the changed model computes what it did, up to rounding. To load such a model, make it,
    apply this, then load the state dict: from_pretrained knows nothing of the new parameters and leaves them out.

    Args:
        model: changed in place. Its layers must have their own forward: apply before accelerate's device hooks, and
            before sharding. A norm that was replaced or has hooks is called as it is, unfused.
        variant: a key of effkern.nn.laurel.VARIANTS: "rw", "lr", "pa-id", "rw+lr", "rw+lr+pa" ...
        placement: "both" attention and MLP (laurel_attn, laurel_mlp), "attn", "ffn", or "block": one for the whole
            layer (laurel_block), whose f is what attention and MLP add up to; the residual inside stays plain.
        look_back: k >= 1, the inputs that a residual mixes, its own and those of the k - 1 residuals before it, across
            layers. Only for variants with "pa".
        rank, scalar_map, per_channel, x0, init, save_branch, impl: see effkern.nn.LaurelResidual; x0 is the first
            layer's input.

    Returns:
        `model`. Its parameters named weights, gamma and x0_weight (LaurelResidual.scalars) want no weight decay.

    Raises:
        ValueError: another architecture, a model it was applied to before, or an argument that breaks a rule; the
            model is then as it was.
        NotImplementedError: later, in a forward pass: a pa variant or x0 under checkpointing with use_reentrant=True.

    Memory: pa-id and rw+pa keep k - 1 hidden states alive beside the current one, the low-rank variants rank numbers
    per token, layer and later reader; with gradients the whole pass's.
    Source: Menghani et al., arXiv 2411.07501, section 3.
    """
    op = "apply_laurel"
    if placement not in PLACEMENTS:
        raise ValueError(f"{op}: placement must be one of {sorted(PLACEMENTS)}, got {placement!r}")
    if look_back < 1:
        raise ValueError(f"{op}: look_back must be at least 1, got {look_back!r}")
    decoder = find_decoder(op, model, LAYOUTS, NAMES)
    require_untouched(op, decoder, "remove_laurel")
    layers: list[Any] = list(decoder.layers)  # type: ignore[arg-type]
    names = PLACEMENTS[placement]
    count = len(layers) * len(names)
    reads_others = variant in VARIANTS and VARIANTS[variant].previous
    back = look_back - 1 if reads_others else 0
    residuals = []
    for i in range(count):
        like = layers[i // len(names)].input_layernorm.weight
        residual = LaurelResidual(
            like.shape[0], variant, rank=rank, num_previous=min(i, back), num_following=min(count - 1 - i, back),
            scalar_map=scalar_map, per_channel=per_channel, x0=x0, init=init, save_branch=save_branch,
            impl=impl, device=like.device, dtype=like.dtype,
        )  # fmt: skip
        residuals.append(residual.train(model.training))
    LaurelResidual.link(residuals)
    for i, layer in enumerate(layers):
        layout = LAYOUTS[path_of(layer)]
        for name, residual in zip(names, residuals[i * len(names) :]):
            layer.add_module(name, residual)
        layer.laurel_place = Place(i, layout, reads_others, x0)
        swap(layer, forward_mask_first if layout.mask_first else forward_mask_second)
    if reads_others or x0:
        decoder._laurel_hook = decoder.register_forward_pre_hook(begin, with_kwargs=True)  # type: ignore[assignment]
    return model


def remove_laurel(model: Model) -> Model:
    """Undo apply_laurel: the original layers and state dict; what the residuals learned is gone.

    Raises:
        ValueError: apply_laurel was not applied to `model`.
    """
    decoder: Any = find_decoder("remove_laurel", model, LAYOUTS, NAMES)
    if not all(is_swapped(layer) for layer in decoder.layers):
        rule = "be one that apply_laurel was applied to"
        raise ValueError(f"remove_laurel: model must {rule}, got an unchanged {type(model).__name__}")
    for layer in decoder.layers:
        for name in {n for names in PLACEMENTS.values() for n in names} & set(layer._modules):
            delattr(layer, name)
        del layer.laurel_place
        restore(layer)
    if hasattr(decoder, "_laurel_hook"):
        decoder._laurel_hook.remove()
        del decoder._laurel_hook
    return model
