"""Presets of papers on looped blocks and on LAuReL. SALT's are in effkern.train.presets.

Shampoo's paper has a regression and no language model (benchmarks/papers/shampoo_regression.py); LoRA-RITE's adapts
trained models (`effkern finetune`).
"""

from dataclasses import replace

from effkern.models import DecoderConfig, LaurelConfig, LoopConfig
from effkern.train.config import DataConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig

LOOPED_UNCONFIRMED = (
    "model.mlp (SwiGLU), norms, rotary positions, model.vocab_size: not published, ours",
    "optimizer.name, betas, weight_decay, clip_norm, warmup_steps, min_lr_ratio: not published, ours; the paper's "
    "language models peak at 0.01, which fits Adafactor better than AdamW",
    "model.loop.stages=4x1,4x4,4x1 of the middle loop: read from a label cut short",
)
LAUREL_UNCONFIRMED = (
    "model.laurel.placement=block, one residual per block: inferred from published parameter counts",
    "model.hidden_size=768, model.vocab_size=32000: inferred from the same counts; model.mlp_size=1368 gives the "
    "published 5.51M a layer with SwiGLU",
    "heads, data.batch_size, data.seq_len, the whole section optimizer: not published, ours",
    "schedule.steps: about 10B tokens, as published, at our batch",
)


def looped() -> dict[str, tuple[TrainConfig, str, tuple[str, ...]]]:
    """{name: (config, about, unconfirmed)} of arXiv 2502.17416, section on language modelling."""
    plain = TrainConfig(
        model=DecoderConfig(
            # Unconfirmed.
            vocab_size=32000,
            vocab_multiple=128,
            hidden_size=2048,
            num_layers=24,
            num_heads=32,
            num_kv_heads=32,
            mlp_size=5120,
            max_seq_len=1280,
        ),
        data=DataConfig(path="data/pile", seq_len=1280, batch_size=512, micro_batch_size=8),
        # The rate is the paper's; everything else of the optimizer is unconfirmed.
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=10000),
        schedule=ScheduleConfig(steps=400000),
        run=RunConfig(
            out="runs/paper-24x1", eval_every=4000, eval_tokens=1 << 22, checkpoint_every=4000, log_every=20,
            compile=True,
        ),
    )  # fmt: skip

    def stages(name: str, layers: int, text: str) -> TrainConfig:
        model = replace(plain.model, num_layers=layers, stack="looped", loop=LoopConfig(stages=text))
        return replace(plain, model=model, run=replace(plain.run, out=f"runs/paper-{name}"))

    return {
        "paper-24x1": (plain, "the 24 layers of arXiv 2502.17416", LOOPED_UNCONFIRMED),
        "paper-12x1": (
            replace(plain, model=replace(plain.model, num_layers=12), run=replace(plain.run, out="runs/paper-12x1")),
            "12 of them",
            LOOPED_UNCONFIRMED,
        ),
        "paper-12x2": (stages("12x2", 12, "12x2"), "12 layers, twice", LOOPED_UNCONFIRMED),
        "paper-middle-loop": (
            stages("middle-loop", 12, "4x1,4x4,4x1"), "12 layers, the middle ones four times", LOOPED_UNCONFIRMED,
        ),
    }  # fmt: skip


def laurel() -> dict[str, tuple[TrainConfig, str, tuple[str, ...]]]:
    """{name: (config, about, unconfirmed)} of arXiv 2411.07501's ablation on C4."""
    plain = TrainConfig(
        model=DecoderConfig(
            # Unconfirmed: all but the number of layers.
            vocab_size=32000,
            hidden_size=768,
            num_layers=24,
            num_heads=12,
            num_kv_heads=12,
            mlp_size=1368,
            max_seq_len=1024,
        ),
        # Unconfirmed.
        data=DataConfig(path="data/c4", seq_len=1024, batch_size=512, micro_batch_size=32),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1000),
        schedule=ScheduleConfig(steps=19073),
        run=RunConfig(
            out="runs/paper-c4-24", eval_every=500, eval_tokens=1 << 22, checkpoint_every=500, log_every=20,
            compile=True,
        ),
    )  # fmt: skip
    more = replace(plain, model=replace(plain.model, num_layers=28), run=replace(plain.run, out="runs/paper-c4-28"))
    # The rank is published, the placement inferred.
    chosen = LaurelConfig(variant="rw+lr", rank=32, placement="block")
    with_laurel = replace(
        plain,
        model=replace(plain.model, residual="laurel", laurel=chosen),
        run=replace(plain.run, out="runs/paper-laurel"),
    )
    return {
        "paper-laurel": (with_laurel, "RW+LR of rank 32 in 24 layers, arXiv 2411.07501", LAUREL_UNCONFIRMED),
        "paper-c4-24": (plain, "the same without LAuReL", LAUREL_UNCONFIRMED),
        "paper-c4-28": (more, "the same with four more layers in its place", LAUREL_UNCONFIRMED),
    }
