"""Presets of `effkern finetune`: the setting of LoRA-RITE's paper (arXiv 2410.20625), and the AdamW beside it.

Its models, data and tables of batch sizes, lengths and steps are not among them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FinetunePreset:
    """Arguments of `effkern finetune`, and what of them no source confirms."""

    settings: Mapping[str, Any]
    about: str
    unconfirmed: tuple[str, ...]


_PUBLISHED = {"rank": 16, "dropout": 0.0, "weight_decay": 0.0}
_UNCONFIRMED = (
    "lr: 2e-4 for LoRA-RITE beside 1e-5 for Adam is what reviewers report of one task; over the tasks their ratio is "
    "20 to 100",
    "alpha=16: of the authors' example script (with rank 8 and dropout 0.05), not of the paper",
    "targets, steps, batch_size, seq_len, warm-up, cosine: not published where we could read it, ours",
    "clipping: of the unmagnified gradients by the optimizer itself, as in the authors' code; not found in the paper",
)
FINETUNE_PRESETS: dict[str, FinetunePreset] = {
    "paper-lora-rite": FinetunePreset(
        {**_PUBLISHED, "optimizer": "lora_rite", "lr": 2e-4, "alpha": 16.0},
        "LoRA-RITE of rank 16, arXiv 2410.20625",
        _UNCONFIRMED,
    ),
    "paper-lora-adam": FinetunePreset(
        {**_PUBLISHED, "optimizer": "adamw", "lr": 1e-5, "alpha": 16.0},
        "the Adam that it is compared with",
        _UNCONFIRMED[:-1],
    ),
}


def get_finetune_preset(name: str) -> FinetunePreset:
    """The preset `name`. Raises ValueError naming those that exist."""
    if name not in FINETUNE_PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(FINETUNE_PRESETS)}, got {name!r}")
    return FINETUNE_PRESETS[name]
