"""Decoders of transformers with random weights, small enough for a test, and what they compute."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Not the default of anything.
    "rms_norm_eps": 1e-3,
    # Branches as large as the stream.
    "initializer_range": 0.2,
}
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3")


def decoder(family: str, **changes):
    """<family>ForCausalLM whose norms' weights differ from their start, in evaluation mode."""
    name = f"{family}TextConfig" if family.startswith("Gemma3") else f"{family}Config"
    config = getattr(transformers, name)(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    return shaken(model.eval(), "norm")


def gemma3n(**changes):
    """Four layers, the last two of which take keys and values from the second."""
    own = {
        "intermediate_size": [48] * 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "sliding_window": 16,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    }
    model = decoder("Gemma3n", **{**own, **changes})
    # The library starts these at 0.
    return shaken(model, "correct_output_scale", "altup.correction_coefs", "altup.prediction_coefs")


@torch.no_grad()
def shaken(model, *names: str, size: float = 0.3):
    """The model after a random step of the parameters that hold one of `names`."""
    for name, p in model.named_parameters():
        if any(n in name for n in names):
            p.add_(size * torch.randn_like(p))
    return model


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length))


def step(model, ids: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of a fixed sum of them."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    if weight is None:
        weight = torch.sin(torch.arange(logits.numel())).view(logits.shape)
    (logits * weight.to(logits.dtype)).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def double(model):
    return copy.deepcopy(model).double()


# The classes that patch knows beside those above, with what is not LlamaConfig's in theirs.
OTHERS = ("Gemma3n", "Phi", "Cohere", "Granite", "GPT2", "GPTNeoX")
_NAMES = {"GPT2": "GPT2LMHeadModel"}


def causal(family: str, **changes):
    """A causal language model of any family that patch knows, in evaluation mode, nothing of its own left neutral."""
    if family in FAMILIES:
        return decoder(family, **{**({"final_logit_softcapping": 3.0} if family == "Gemma2" else {}), **changes})
    if family == "Gemma3n":
        return gemma3n(**{"final_logit_softcapping": 3.0, **changes})
    sizes = {k: v for k, v in SIZES.items() if k not in ("head_dim", "rms_norm_eps")}
    own = {
        "Cohere": {"logit_scale": 0.3},
        "Granite": {"logits_scaling": 2.5},
        "GPT2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 48},
    }.get(family, {})
    config = getattr(transformers, f"{family}Config")(**{**sizes, **own, **changes})
    # Not dropped out, so that two passes may be compared.
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = getattr(transformers, _NAMES.get(family, f"{family}ForCausalLM"))(config)
    return shaken(model.eval(), "norm", "ln_", "lm_head.bias")
