"""One call that puts our ops into a causal language model of transformers, and one that takes them out."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from effkern.integrations.transformers import heads
from effkern.integrations.transformers.apply import apply_laurel, remove_laurel
from effkern.integrations.transformers.fused_loss import FusedLoss, head_forward, model_forward
from effkern.integrations.transformers.gemma3n import remove_fused_laurel, use_fused_laurel
from effkern.integrations.transformers.loop import loop_layers, unloop_layers
from effkern.integrations.transformers.swap import is_patched, is_swapped, original_class, path_of, restore, swap
from effkern.nn.distill import LinearDistillLoss
from effkern.ops.distill.rows import SPARSE_KINDS

Model = TypeVar("Model", bound=nn.Module)

_FROM_CONFIG = ("softcap", "logit_scale", "reduction", "ignore_index")
_UNDO = {"laurel": remove_laurel, "fused_laurel": remove_fused_laurel, "loop": unloop_layers}


def patch(
    model: Model,
    distill_loss: bool | Mapping[str, Any] = True,
    laurel: bool | str | Mapping[str, Any] | None = None,
    loop: Sequence[int] | Mapping[str, Any] | None = None,
) -> Model:
    """Put effkern's ops into a causal language model of transformers: loss, residuals, loops.

    With distill_loss a forward pass with labels gets its loss from the hidden states, tokens x vocabulary never exists:

        z = softcap(logit_scale (h W^T + b)),  loss = 1/n sum_t [(1 - omega) CE(z_t, token t+1) + omega D(p_t, q_t)]

    n is num_items_in_batch where a trainer passes it, else the number of labels that are not -100. Without a teacher
    that is the model's own loss, up to rounding. softcap, logit_scale and the number of rows of W that count
    (vocab_size, of a layer that may be padded) come from the model's config. Without labels nothing changes: generate,
    logits, caches. The state dict stays the same.

    For Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Gemma3 and Gemma3n (text), Phi, Cohere, Granite, GPT2, GPTNeoX.

    The patched forward takes these keywords beside its own:
        teacher: an effkern Teacher whose rows stand for positions as the labels do before the shift: [batch, length,
            ...]; row t speaks of token t + 1. `teacher_hidden` makes one of another model.
        teacher_ids, teacher_logprobs: [batch, length, K], in place of `teacher`: sparse labels as columns of a data
            set. transformers' Trainer keeps columns of these names.
        omega: weight of the teacher, in place of that of `distill_loss`.
        skip_logits: True: no logits beside a loss; False: logits, too; None: True while training. The loss is the same.

    Args:
        model: changed in place; a PEFT model's inside. Patch before torch.compile, FSDP2 and accelerate's prepare; PEFT
            may come before or after, with an output layer that is left alone or in modules_to_save.
        distill_loss: True, False, or options of effkern.nn.LinearDistillLoss (divergence, alpha, beta, temperature,
            teacher_temperature, t_squared, z_loss, label_smoothing, vocab_valid, impl ...) and omega, skip_logits,
            teacher_kind (of teacher_ids, "tail_bucket" by default).
        laurel: True, a variant, or arguments of `apply_laurel`; for Gemma3n True or arguments of `use_fused_laurel`.
        loop: (start, stop, loops) or arguments of `loop_layers`. laurel and loop change the same layers: one of them.

    Returns:
        `model`.

    Raises:
        ValueError, TypeError: another architecture, a model that is patched already, tied weights that are not tied,
            an output layer that is quantized, replaced, shared with a patched model or has hooks, a forward that
            another package put in, an option that breaks a rule. The model is as it was. Later, in forward: a teacher
            without labels, or an output layer, a loss or a config that is not the one patch has seen.

    A batch without any label has loss 0, where transformers gives nan. Logits are float32 inside whatever the model's
    dtype; in bfloat16 the loss is closer to the exact one than the library's.
    Memory: one chunk of logits, see effkern.linear_distill_loss, and the gradients of hidden states and output layer.
    """
    op = "patch"
    causal = heads.causal_model(op, model)
    if laurel not in (None, False) and loop is not None:
        raise ValueError(f"{op}: laurel and loop must not come together, as both change the layers, got both")
    if distill_loss is False and laurel in (None, False) and loop is None:
        raise ValueError(f"{op}: distill_loss, laurel or loop must ask for something, got none")
    done = vars(causal).get("effkern_patch")
    if done:
        name, got = type(causal).__name__, f"one with {', '.join(done)}"
        raise ValueError(f"{op}: {name} must be unchanged (unpatch first), got {got}")
    fused = None if distill_loss is False else _plan(op, causal, {} if distill_loss is True else distill_loss)
    # These leave the model as it was where they raise; what follows them raises no more.
    names = _change_layers(causal, laurel, loop)
    if fused is not None:
        swap(causal.get_output_embeddings(), head_forward)  # type: ignore[operator]
        swap(causal, model_forward)
        causal.effkern_loss = fused  # type: ignore[assignment]
        names.append("distill_loss")
    causal.effkern_patch = tuple(names)  # type: ignore[assignment]
    return model


def unpatch(model: Model) -> Model:
    """Undo patch: classes, attributes and state dict as before; weights stay as trained, learned residuals go.

    Raises:
        ValueError: patch was not applied to `model`, or it was sharded or wrapped since; the model is as it was.
    """
    op = "unpatch"
    causal: Any = model
    if hasattr(causal, "get_base_model"):
        causal = causal.get_base_model()
    names = vars(causal).get("effkern_patch")
    if names is None:
        raise ValueError(f"{op}: model must be one that patch was applied to, got {type(causal).__name__}")
    if original_class(causal) not in type(causal).__mro__[:2] or is_patched(causal):
        rule = "be as patch left it (undo sharding, prepare and wrappers first)"
        raise ValueError(f"{op}: model must {rule}, got {type(causal).__module__}.{type(causal).__qualname__}")
    backbone = getattr(causal, heads.FAMILIES[path_of(causal)].backbone)
    for name in names:
        # Undone by hand before, layers are the library's again.
        if name in _UNDO and any(map(is_swapped, backbone.modules())):
            _UNDO[name](causal)
    if "distill_loss" in names:
        restore(causal)
        for layer in causal.get_output_embeddings().modules():
            restore(layer)
        del causal.effkern_loss
    del causal.effkern_patch
    return model


def _plan(op: str, causal: Any, options: Mapping[str, Any]) -> FusedLoss:
    heads.require_own_forward(op, causal)
    head = heads.head_of(op, causal)
    if not isinstance(options, Mapping):
        raise TypeError(f"{op}: distill_loss must be True, False or options by name, got {options!r}")
    rest = dict(options)
    taken = sorted(set(rest) & set(_FROM_CONFIG))
    if taken:
        raise TypeError(f"{op}: {', '.join(taken)} must be left out of distill_loss, as the model decides on it")
    omega, skip = rest.pop("omega", None), rest.pop("skip_logits", None)
    kind = rest.pop("teacher_kind", "tail_bucket")
    if kind not in SPARSE_KINDS:
        raise ValueError(f"{op}: teacher_kind must be one of {', '.join(SPARSE_KINDS)}, got {kind!r}")
    if omega is not None and not (isinstance(omega, (int, float)) and 0 <= omega <= 1):
        raise ValueError(f"{op}: omega must be in [0, 1], got {omega!r}")
    rows = causal.get_output_embeddings().weight.shape[0]
    vocab = rest.pop("vocab_valid", None)
    vocab = head.vocab if vocab is None else vocab
    if type(vocab) is not int or not 1 <= vocab <= rows:
        raise ValueError(f"{op}: vocab_valid must be in 1 ... {rows}, the rows of the output layer, got {vocab!r}")
    loss_fn = LinearDistillLoss(
        softcap=head.softcap, logit_scale=head.logit_scale, vocab_valid=None if vocab == rows else vocab, **rest
    )
    output = heads.output_class(causal, head.family)
    fields = tuple(f.name for f in dataclasses.fields(output) if f.name not in ("loss", "logits"))
    parameters = inspect.signature(original_class(causal).forward).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
    neutral = vocab == rows == head.vocab and not (rest.get("z_loss") or rest.get("label_smoothing"))
    return FusedLoss(head, loss_fn, omega, kind, skip, names[1:], output, fields, neutral)


def _change_layers(causal: nn.Module, laurel: Any, loop: Any) -> list[str]:
    """What was done, by name."""
    if loop is not None:
        if not isinstance(loop, Mapping) and (not isinstance(loop, Sequence) or len(loop) != 3):
            raise TypeError(f"patch: loop must be (start, stop, loops) or arguments of loop_layers, got {loop!r}")
        arguments = loop if isinstance(loop, Mapping) else dict(zip(("start", "stop", "loops"), loop))
        loop_layers(causal, **arguments)
        return ["loop"]
    if laurel in (None, False):
        return []
    if laurel is not True and not isinstance(laurel, (str, Mapping)):
        raise TypeError(f"patch: laurel must be True, a variant or arguments of apply_laurel, got {laurel!r}")
    arguments = laurel if isinstance(laurel, Mapping) else {} if laurel is True else {"variant": laurel}
    if "gemma3n" in path_of(causal):
        if isinstance(laurel, str):
            raise ValueError(f"patch: laurel must be True or arguments of use_fused_laurel for Gemma3n, got {laurel!r}")
        use_fused_laurel(causal, **arguments)
        return ["fused_laurel"]
    apply_laurel(causal, **arguments)
    return ["laurel"]
