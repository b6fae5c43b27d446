"""The causal language models that patch knows: where their backbone is, and what becomes of the hidden states."""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkern.integrations.transformers.swap import is_patched, is_swapped, original_class, path_of
from effkern.ops.distill import checks


class Family(NamedTuple):
    """How a class <name>ForCausalLM goes from its hidden states to its loss, beside what its config says."""

    backbone: str = "model"
    """The attribute that holds everything but the output layer."""
    output: str = "CausalLMOutputWithPast"
    """The class of forward's result, which the library's module imports."""
    scale: str | None = None
    """The number in the config that multiplies the logits."""
    divides: bool = False
    """It divides them instead."""


_FAMILIES = {
    "Llama": Family(),
    "Mistral": Family(),
    "Qwen2": Family(),
    "Qwen3": Family(),
    "Gemma": Family(),
    "Gemma2": Family(),
    "Gemma3": Family(),
    "Gemma3n": Family(),
    "Phi": Family(),
    "Cohere": Family(scale="logit_scale"),
    "Granite": Family(scale="logits_scaling", divides=True),
    "GPT2": Family("transformer", "CausalLMOutputWithCrossAttentions"),
    "GPTNeoX": Family("gpt_neox"),
}
# Names of modules and classes that do not follow from the family's.
_MODULES = {"GPTNeoX": "gpt_neox"}
_CLASSES = {"GPT2": "GPT2LMHeadModel"}


def _path(family: str) -> str:
    module = _MODULES.get(family, family.lower())
    return f"transformers.models.{module}.modeling_{module}.{_CLASSES.get(family, f'{family}ForCausalLM')}"


NAMES = ", ".join(_FAMILIES)
FAMILIES = {_path(name): family for name, family in _FAMILIES.items()}


class Head(NamedTuple):
    """What stands between hidden states and loss: z = softcap(logit_scale (h W^T + b)) over the first `vocab` rows."""

    family: Family
    vocab: int
    softcap: float | None
    logit_scale: float


def causal_model(op: str, model: nn.Module) -> nn.Module:
    """The causal language model itself, from under PEFT where it is.

    Raises:
        ValueError: another architecture, or wrapped.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if path_of(inner) not in FAMILIES:
        rule = f"be a causal language model of transformers' {NAMES} (before it is compiled, sharded or wrapped)"
        raise ValueError(f"{op}: model must {rule}, got {type(inner).__name__}")
    return inner


def head_of(op: str, model: Any) -> Head:
    """What the config of `model`, a result of causal_model, says about its output layer.

    Raises:
        ValueError, TypeError: the output layer is no plain matrix (quantized, adapted, replaced), is smaller than the
            vocabulary, or should be the embedding and is not.
    """
    family = FAMILIES[path_of(model)]
    config = model.config.get_text_config()
    name, layer = type(model).__name__, model.get_output_embeddings()
    if path_of(layer) != "torch.nn.modules.linear.Linear":
        rule = "be a torch.nn.Linear (no quantized or adapted one)"
        raise TypeError(f"{op}: the output layer of {name} must {rule}, got {path_of(layer)}")
    weight = layer.weight
    if weight.dtype not in checks.FLOATING or type(weight.data) not in (Tensor, _dtensor()):
        got = f"{type(weight.data).__name__} of {weight.dtype}"
        raise TypeError(f"{op}: the output layer of {name} must have an unquantized floating weight, got {got}")
    vocab = int(config.vocab_size)
    if weight.shape[0] < vocab:
        got = f"{weight.shape[0]} rows"
        raise ValueError(f"{op}: the output layer of {name} must cover config.vocab_size={vocab}, got {got}")
    embedding = model.get_input_embeddings().weight
    if getattr(config, "tie_word_embeddings", False) and weight is not embedding:
        rule = "be tied to the embedding, as config.tie_word_embeddings says (tie_weights(), or say False there)"
        raise ValueError(f"{op}: the output layer of {name} must {rule}, got a weight of its own")
    return _configured(model, family)


def _configured(model: Any, family: Family) -> Head:
    config = model.config.get_text_config()
    factor = 1.0 if family.scale is None else float(getattr(config, family.scale))
    cap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0 / factor if family.divides else factor
    return Head(family, int(config.vocab_size), None if cap is None else float(cap), scale)


def require_as_seen(op: str, model: Any, seen: Head, resizable: bool) -> None:
    """At a call: the model computes what it did when it was patched.

    Args:
        resizable: every row of the output layer counts, so that it may have another size by now.

    Raises:
        ValueError: its loss or its config is another.
    """
    undo, now = "(unpatch, change the model, patch again)", _configured(model, seen.family)
    loss = _foreign_loss(model)
    if loss is not None:
        raise ValueError(f"{op}: the loss must be the one that patch has seen {undo}, got {loss}")
    numbers = [("softcap", seen.softcap, now.softcap), ("logit scale", seen.logit_scale, now.logit_scale)]
    if not (resizable and now.vocab == model.get_output_embeddings().weight.shape[0]):
        numbers.append(("vocab_size", seen.vocab, now.vocab))
    for name, before, after in numbers:
        if before != after:
            raise ValueError(f"{op}: the config's {name} must be {before}, as patch has seen it {undo}, got {after}")


def require_own_forward(op: str, model: Any) -> None:
    """
    Raises:
        ValueError: something else replaced forward or loss, or the output layer is another patched model's, or somebody
            watches its logits.
    """
    name, layer = type(model).__name__, model.get_output_embeddings()
    for label, module in ((name, model), (f"the output layer of {name}", layer)):
        if is_patched(module):
            rule = "have its class's forward (patch before accelerate's prepare and other patches)"
            raise ValueError(f"{op}: {label} must {rule}, got one of its own")
    foreign = _foreign_forward(original_class(model))
    if foreign is not None:
        rule = "have the library's forward (patch a class that nothing else has changed)"
        raise ValueError(f"{op}: {name} must {rule}, got one of {foreign}")
    if is_swapped(layer):
        rule = "be unchanged and its own (unpatch the model that shares it)"
        raise ValueError(f"{op}: the output layer of {name} must {rule}, got a patched one")
    # Called for a loss it would give hooks the loss, and its gradient, in place of logits.
    hooks = {"forward": layer._forward_hooks, "backward": {**layer._backward_hooks, **layer._backward_pre_hooks}}
    for kind, found in hooks.items():
        if found:
            rule = "have no hooks, for it makes no logits (remove them, patch, and see the model's hidden states)"
            raise ValueError(f"{op}: the output layer of {name} must {rule}, got {len(found)} {kind} hooks")
    loss = _foreign_loss(model)
    if loss is not None:
        raise ValueError(f"{op}: the loss of {name} must be transformers' ForCausalLMLoss, got {loss}")


def _foreign_loss(model: Any) -> str | None:
    """The name of a loss that is not the library's usual one."""
    if "_loss_function" in vars(model):
        return getattr(model._loss_function, "__name__", type(model._loss_function).__name__)
    kind = getattr(model, "loss_type", None)
    return None if kind in (None, "ForCausalLM") else kind


def _foreign_forward(own: Any) -> str | None:
    """The module that put its forward, or a wrapper around it, into the library's class `own`; None: nobody has."""
    package = own.__module__.partition(".")[0]
    forward = own.forward
    while forward is not None:
        # functools.wraps copies __module__, not this.
        where = getattr(forward, "__globals__", {}).get("__name__", "elsewhere")
        if where.partition(".")[0] != package:
            return where
        forward = getattr(forward, "__wrapped__", None)
    return None


def output_class(model: nn.Module, family: Family) -> Any:
    """The class of forward's result; the library is there, as the model is."""
    return getattr(sys.modules[type(model).__module__], family.output)


def capped(logits: Tensor, head: Head) -> Tensor:
    """Raw products as the library's logits, in its order of operations."""
    if head.logit_scale != 1.0:
        logits = logits * head.logit_scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def _dtensor() -> Any:
    """DTensor where torch has it; a class that nothing is of, where it has not."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return getattr(distributed, "DTensor", None)
