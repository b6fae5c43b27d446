"""A trained model as a folder that transformers loads: config.json, model.safetensors, tokenizer.

A decoder without LAuReL and loops is a Llama and is written as one; any other goes with a modeling file of its own, a
copy of hf/modeling_effkern.py. Nothing here needs transformers.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from effkern.data.tokenizer import TextEncoder, load_encoder
from effkern.models import Decoder, DecoderConfig
from effkern.train.restore import load_model

MODELING = Path(__file__).with_name("hf") / "modeling_effkern.py"
LAYOUTS = ("auto", "llama", "effkern")


def is_llama(config: DecoderConfig) -> bool:
    """Whether transformers' LlamaForCausalLM computes this decoder."""
    return (config.residual, config.stack, config.mlp) == ("add", "plain", "swiglu")


def llama_config(config: DecoderConfig) -> dict[str, Any]:
    """config.json of the same Llama. Rows that pad the vocabulary are left out."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        # Readers older than transformers 5 look here.
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_head,
        "attention_bias": False,
        "mlp_bias": False,
    }


def llama_weights(model: Decoder) -> dict[str, Tensor]:
    """The weights under Llama's names. Both turn channels i and i + head_dim / 2, so that no row moves."""
    config, own = model.config, model.state_dict()
    width, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    found = {"model.embed_tokens.weight": own["embedding.weight"][: config.vocab_size]}
    for i in range(config.num_layers):
        old, new = f"stack.blocks.{i}", f"model.layers.{i}"
        query, key, value = own[f"{old}.attention.qkv.weight"].split((width, kv, kv))
        gate, up = own[f"{old}.mlp.gate_up.weight"].chunk(2)
        found |= {
            f"{new}.input_layernorm.weight": own[f"{old}.attention_norm.weight"],
            f"{new}.self_attn.q_proj.weight": query,
            f"{new}.self_attn.k_proj.weight": key,
            f"{new}.self_attn.v_proj.weight": value,
            f"{new}.self_attn.o_proj.weight": own[f"{old}.attention.out.weight"],
            f"{new}.post_attention_layernorm.weight": own[f"{old}.mlp_norm.weight"],
            f"{new}.mlp.gate_proj.weight": gate,
            f"{new}.mlp.up_proj.weight": up,
            f"{new}.mlp.down_proj.weight": own[f"{old}.mlp.down.weight"],
        }
    found["model.norm.weight"] = own["norm.weight"]
    if not config.tie_head:
        found["lm_head.weight"] = own["head.weight"][: config.vocab_size]
    return found


def own_config(config: DecoderConfig) -> dict[str, Any]:
    """config.json of the wrapper in modeling_effkern.py."""
    return {
        "architectures": ["EffkernForCausalLM"],
        "model_type": "effkern",
        "auto_map": {
            "AutoConfig": "modeling_effkern.EffkernConfig",
            "AutoModelForCausalLM": "modeling_effkern.EffkernForCausalLM",
        },
        "effkern": asdict(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.depth,
        "max_position_embeddings": config.max_seq_len,
        # The decoder ties them itself; its weights hold one table.
        "tie_word_embeddings": False,
    }


def export_hf(checkpoint: str | Path, out: str | Path, *, layout: str = "auto") -> str:
    """Write the model of a run directory or step directory to the new folder `out`; returns the layout.

    Weights keep their bits. transformers' Llama multiplies in another order, so that its float32 logits agree to
    rounding; those of the wrapper are the decoder's own.

    Args:
        layout: "llama", "effkern" (the decoder's own, needs this package and trust_remote_code=True), or "auto": llama
            where the model is one.

    Raises:
        ValueError: `out` holds something, layout="llama" and the model is none, or the tokenizer is missing or another.
        CheckpointError: there is no intact checkpoint.
    """
    out = Path(out)
    if layout not in LAYOUTS:
        raise ValueError(f"export: layout must be one of {LAYOUTS}, got {layout!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"export: out must be a new folder, got {out}, which holds something")
    loaded = load_model(checkpoint)
    config, llama = loaded.model.config, layout != "effkern" and is_llama(loaded.model.config)
    if layout == "llama" and not llama:
        parts = f"residual={config.residual!r}, stack={config.stack!r}, mlp={config.mlp!r}"
        raise ValueError(f"export: layout must be 'effkern' or 'auto' for a model that is no Llama, got {parts}")
    tokenizer = loaded.path.parent.parent / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(f"export: {tokenizer} must be there, the tokenizer of the run")
    encoder = load_encoder(tokenizer)
    if encoder.sha256 != loaded.inputs.tokenizer:
        raise ValueError(f"export: tokenizer must be the one that {loaded.path} was trained with, got another one")
    if llama:
        settings, weights = llama_config(config), llama_weights(loaded.model)
    else:
        settings = own_config(config)
        weights = {f"decoder.{name}": tensor for name, tensor in loaded.model.state_dict().items()}
    _write(out, {**settings, **_common(encoder)}, weights, encoder, config.max_seq_len, None if llama else MODELING)
    return "llama" if llama else "effkern"


def _common(encoder: TextEncoder) -> dict[str, Any]:
    return {"dtype": "float32", "bos_token_id": None, "eos_token_id": encoder.eos_id, "pad_token_id": None}


def _write(
    out: Path,
    settings: dict[str, Any],
    weights: dict[str, Tensor],
    encoder: TextEncoder,
    max_len: int,
    modeling: Path | None,
) -> None:
    """Everything goes to a folder beside `out`, which one rename publishes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        separate = {name: tensor.detach().to(torch.float32).clone() for name, tensor in weights.items()}
        save_file(separate, folder / "model.safetensors", metadata={"format": "pt"})
        # Bit for bit the file that the training data was made with.
        (folder / "tokenizer.json").write_bytes(encoder.file)
        if modeling is not None:
            shutil.copyfile(modeling, folder / modeling.name)
        documents = {
            "config.json": settings,
            "generation_config.json": {"eos_token_id": encoder.eos_id, "use_cache": modeling is None},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": encoder.eos_token,
                "model_max_length": max_len,
                "clean_up_tokenization_spaces": False,
                # A special token spelled out in a text is the plain text it is, as in training.
                "split_special_tokens": True,
            },
        }
        for name, document in documents.items():
            (folder / name).write_text(json.dumps(document, indent=2) + "\n")
        if out.exists():
            out.rmdir()
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
