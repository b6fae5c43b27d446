"""`effkern finetune`: LoRA on a trained checkpoint, merged and exported at the end."""

import argparse
import inspect
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Literal


def finetune(
    checkpoint: Path,
    data: Path,
    out: Path = Path("runs/finetune"),
    optimizer: Literal["lora_rite", "adamw", "lora_muon", "scaled_adam"] = "lora_rite",
    lr: float = 0.0,
    steps: int = 200,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = "qkv,out,gate_up,down",
    dropout: float = 0.0,
    lr_ratio: float = 1.0,
    train_a: bool = True,
    batch_size: int = 0,
    micro_batch_size: int = 0,
    seq_len: int = 0,
    weight_decay: float = 0.0,
    eval_every: int = 50,
    checkpoint_every: int = 100,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    threads: int = 0,
    mode: Literal["none", "ddp"] = "none",
    preset: str = "",
    restart: bool = False,
) -> int:
    """Train LoRA adapters on a trained model; a folder that holds checkpoints is resumed.

    out/merged is then a run directory with the adapters in the weights, for eval, generate and finetune; out/adapter
    holds the factors in PEFT's file format.

    Args:
        checkpoint: run directory or step directory of the trained model.
        data: packed dataset with the model's tokenizer (data build --tokenizer RUN/tokenizer.json).
        out: run directory.
        optimizer: lora_rite, adamw, lora_muon or scaled_adam.
        lr: learning rate; 0 takes the optimizer's default.
        steps: optimizer steps.
        rank: of the adapters.
        alpha: the product is scaled by alpha / rank.
        targets: layers with adapters, by the end of their names, with commas between.
        dropout: of the adapters' inputs.
        lr_ratio: learning rate of B over that of A (LoRA+).
        train_a: no-train-a keeps A as it starts (LoRA-FA).
        batch_size: sequences of a step; 0 takes that of the model's training.
        micro_batch_size: sequences of one forward pass; 0 is batch_size.
        seq_len: 0 takes the length of the model's training.
        weight_decay: of the factors.
        eval_every: steps between validations.
        checkpoint_every: steps between checkpoints.
        seed: of A and of the data order.
        device: auto, cpu or cuda.
        precision: auto, fp32 or bf16 (autocast).
        threads: CPU threads; 0 leaves torch's default.
        mode: ddp: the processes of torchrun share each batch.
        preset: paper-lora-rite or paper-lora-adam: a paper's rank, rate and so on; what is given beside it counts.
        restart: throw away what out holds instead of resuming it.
    """
    from dataclasses import replace

    from effkern.train.finetune import finetune as run
    from effkern.train.finetune import finetune_config
    from effkern.train.presets_finetune import get_finetune_preset

    main_rank = int(os.environ.get("RANK", "0")) == 0
    for text in get_finetune_preset(preset).unconfirmed if preset and main_rank else ():
        print(f"unconfirmed in {preset}: {text}")
    config = finetune_config(
        checkpoint,
        data,
        out,
        optimizer=optimizer,
        rank=rank,
        alpha=alpha,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        seq_len=seq_len,
        seed=seed,
        targets=targets,
        dropout=dropout,
        lr_ratio=lr_ratio,
        train_A=train_a,
    )
    config = replace(
        config,
        data=replace(config.data, micro_batch_size=micro_batch_size),
        optimizer=replace(config.optimizer, weight_decay=weight_decay),
        distributed=replace(config.distributed, mode=mode),
        run=replace(
            config.run,
            device=device,
            precision=precision,
            threads=threads,
            restart=restart,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
        ),
    )
    result = run(config)
    if not main_rank:
        return 0 if result.signum is None else 128 + result.signum
    if result.signum is not None:
        print(f"stopped by signal {result.signum} after step {result.state.step}; saved. The same command goes on.")
        return 128 + result.signum
    first, last = result.evals[0], result.evals[-1]
    print(
        f"{out}: {optimizer}, rank {rank}, {result.state.tokens:,} tokens, {result.state.wall_s:.0f} s; validation "
        f"loss {first['loss']:.4f} -> {last['loss']:.4f}, accuracy {100 * last['accuracy']:.2f}%; "
        f"merged model in {out / 'merged'}"
    )
    return 0


def main(arguments: Sequence[str]) -> int:
    """`finetune` with the defaults of --preset, if one is given."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="")
    known, _ = first.parse_known_args(arguments)
    return tyro.cli(_with_defaults(known.preset), prog="effkern finetune", args=list(arguments))


def _with_defaults(preset: str) -> Callable[..., int]:
    if not preset:
        return finetune
    from effkern.train.presets_finetune import get_finetune_preset

    settings = get_finetune_preset(preset).settings

    @wraps(finetune)
    def chosen(*given: Any, **named: Any) -> int:
        return finetune(*given, **named)

    signature = inspect.signature(finetune)
    parameters = [p.replace(default=settings.get(p.name, p.default)) for p in signature.parameters.values()]
    chosen.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return chosen
