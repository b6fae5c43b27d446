"""`effkern eval`, `generate` and `export`: what one does with a trained model."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from effkern.data.tokenizer import TextEncoder
    from effkern.train.restore import LoadedModel


def _load(checkpoint: Path, device: str) -> "tuple[LoadedModel, torch.device, torch.dtype]":
    from effkern.train.device import choose_device, choose_precision
    from effkern.train.restore import load_model

    where = choose_device(device)
    loaded = load_model(checkpoint, where)
    # That of the run, so that its own validation comes out again.
    return loaded, where, choose_precision(loaded.meta["config"]["run"]["precision"], where)


def _encoder(loaded: "LoadedModel", tokenizer: Path | None = None) -> "TextEncoder":
    """The tokenizer of the run, or one that is the same."""
    from effkern.data.tokenizer import load_encoder

    path = tokenizer or loaded.path.parent.parent / "tokenizer.json"
    encoder = load_encoder(path)
    if encoder.sha256 != loaded.inputs.tokenizer:
        raise ValueError(f"tokenizer must be the one that {loaded.path} was trained with, got another one in {path}")
    return encoder


def evaluate(
    checkpoint: Path,
    data: Path | None = None,
    split: Literal["val", "train"] = "val",
    seq_len: int = 0,
    batch_size: int = 16,
    max_tokens: int = 0,
    device: str = "auto",
    json: bool = False,
    tasks: tuple[str, ...] = (),
    task_dir: Path | None = None,
    limit: int = 0,
    num_fewshot: int | None = None,
) -> int:
    """Loss, perplexity, next-token accuracy and bits per byte of a trained model; tasks of lm-evaluation-harness.

    Args:
        checkpoint: run directory or step directory.
        data: packed dataset with the model's tokenizer.
        split: which part of the dataset.
        seq_len: 0 takes the length of the model's training.
        batch_size: sequences of one forward pass.
        max_tokens: 0 is the whole split.
        device: auto, cpu or cuda.
        json: print JSON.
        tasks: names of lm-evaluation-harness (the extra eval), in place of data or beside it.
        task_dir: folder with YAML files of more tasks.
        limit: documents a task; 0 is all.
        num_fewshot: examples in a prompt; the task's by default.
    """
    from json import dumps

    if data is None and not tasks:
        raise ValueError("eval needs --data, --tasks or both, got neither")
    loaded, _, dtype = _load(checkpoint, device)
    report: dict[str, Any] = {"checkpoint": str(loaded.path), "step": loaded.step}
    lines = []
    if data is not None:
        numbers = _on_split(loaded, data, split, seq_len, batch_size, max_tokens, dtype)
        report |= {"split": split, **numbers}
        lines.append(
            f"{loaded.path} on {numbers['tokens']:,} tokens of {split}: loss {numbers['loss']:.4f} nats per token, "
            f"perplexity {numbers['perplexity']:.2f}, accuracy {100 * numbers['accuracy']:.2f}%, "
            f"{numbers['bits_per_byte']:.4f} bits per byte"
        )
    if tasks:
        try:
            from effkern.train.harness import EffkernLM, run_tasks
        except ImportError as error:
            raise ImportError(f"eval --tasks needs the extra eval: pip install 'effkern[eval]' ({error})") from error
        model = EffkernLM(loaded.model, _encoder(loaded), batch_size=batch_size, dtype=dtype)
        report["tasks"] = run_tasks(model, tasks, folder=task_dir, limit=limit, num_fewshot=num_fewshot)
        for task, values in report["tasks"].items():
            shown = ", ".join(f"{name.removesuffix(',none')} {value:.4f}" for name, value in values.items())
            lines.append(f"{task}: {shown}")
    print(dumps(report) if json else "\n".join(lines))
    return 0


def _on_split(
    loaded: "LoadedModel", data: Path, split: str, seq_len: int, batch_size: int, max_tokens: int, dtype: "torch.dtype"
) -> dict[str, Any]:
    import math

    from effkern.data import PackedDataset, val_batches
    from effkern.train.evaluation import evaluate as measure

    dataset = PackedDataset(data)
    if dataset.manifest.tokenizer.sha256 != loaded.inputs.tokenizer:
        raise ValueError(f"data must have the tokenizer that {loaded.path} was trained with, got another one in {data}")
    length = seq_len or loaded.meta["config"]["data"]["seq_len"]
    batches = val_batches(dataset, length, batch_size, max_tokens or None, split=split)
    result = measure(loaded.model, batches, dataset.bytes_per_token(split), dtype)
    # exp of more does not fit a float.
    return {**asdict(result), "perplexity": math.exp(min(result.loss, 700.0))}


def generate(
    checkpoint: Path,
    prompt: str = "-",
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    tokenizer: Path | None = None,
    device: str = "auto",
    loops: int = 0,
    kv_policy: str = "",
    exit: str = "",
) -> int:
    """Continue a prompt.

    Args:
        checkpoint: run directory or step directory.
        prompt: text to continue; - reads it from standard input.
        max_new_tokens: at most this many; fewer at the end of the document.
        temperature: 0 takes the most likely token every time.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens up to this mass.
        seed: of the draws.
        tokenizer: tokenizer.json; by default the one in the run directory.
        device: auto, cpu or cuda.
        loops: of looped stages; 0 takes the model's.
        kv_policy: what looped stages keep: full, latest-available, last, cyclic-S, block-R or window-W.
        exit: leave the loop early: relative-change, cosine, entropy, kl, argmax-stable or gate-cdf, alone or =NUMBER.
    """
    import torch

    from effkern.models import generate_with_loops as sample

    loaded, where, _ = _load(checkpoint, device)
    encoder = _encoder(loaded, tokenizer)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = encoder.encode([text])[0] or [encoder.eos_id]
    found = sample(
        loaded.model,
        torch.tensor([ids], device=where),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        seed=seed,
        eos=encoder.eos_id,
        loops=loops or None,
        kv_policy=kv_policy or None,
        exit=exit or None,
    )
    print(text + encoder.tokenizer.decode(found.tokens[0, len(ids) :].tolist()))
    if exit:
        print(f"{found.loops.double().mean():.2f} loops a token, with {exit}", file=sys.stderr)
    return 0


def export(
    checkpoint: Path, out: Path, to: Literal["hf"] = "hf", layout: Literal["auto", "llama", "effkern"] = "auto"
) -> int:
    """Write a trained model and its tokenizer for other programs.

    Args:
        checkpoint: run directory or step directory.
        out: folder to create.
        to: hf: Hugging Face transformers.
        layout: llama: for LlamaForCausalLM, where the model has neither LAuReL nor loops; effkern: with a modeling file
            of its own (trust_remote_code=True, and this package); auto: llama where it can be.
    """
    from effkern.train.export_hf import export_hf

    written = export_hf(checkpoint, out, layout=layout)
    arguments = f"{str(out)!r}" if written == "llama" else f"{str(out)!r}, trust_remote_code=True"
    print(f"{out}: layout {written}; AutoModelForCausalLM.from_pretrained({arguments})")
    return 0
