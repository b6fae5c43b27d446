"""Fine-tuning: adapters on a trained model, by the trainer's own loop; checkpoints hold the adapter and its optimizer.

A finished run also writes `merged/`, a run directory of the model with the adapter in its weights, which
`effkern eval`, `generate` and `finetune` take like any other, and `adapter/`, the factors in PEFT's file format.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from effkern.models import Decoder
from effkern.nn.lora import inject_lora, lora_layers, lora_state_dict, merged_state_dict
from effkern.train.checkpoint import Checkpoint, save_checkpoint
from effkern.train.config import DataConfig, LoraConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from effkern.train.loop import Trainer, TrainResult
from effkern.train.restore import load_model
from effkern.train.step import StepResult
from effkern.train.timing import StepTimer

# What the learning rate, the betas and eps mean differs by optimizer. The gradient's norm is not the same for two
# equivalent pairs, so that clipping by it would undo what LoRA-RITE and its kin are for; they clip by themselves.
DEFAULTS: Mapping[str, OptimizerConfig] = {
    "lora_rite": OptimizerConfig(lr=2e-3, beta2=0.999, eps=1e-6, weight_decay=0.0, clip_norm=0.0, warmup_steps=10),
    "adamw": OptimizerConfig(lr=1e-3, beta2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0, warmup_steps=10),
    "lora_muon": OptimizerConfig(lr=2e-2, beta1=0.95, weight_decay=0.0, clip_norm=0.0, warmup_steps=10),
    "scaled_adam": OptimizerConfig(lr=1e-3, beta2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=0.0, warmup_steps=10),
}


def build_lora_optimizer(model: nn.Module, lora: LoraConfig, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that `lora.optimizer` names, over the adapters of `model`; the learning rate is set every step.

    With lora.train_A False the factors A have no gradient already.
    """
    from effkern.optim import LoRAMuon, LoRARite, ScaledAdam

    betas = (config.beta1, config.beta2)
    if lora.optimizer == "adamw":
        factors = [layer.factors() for layer in lora_layers(model).values()]
        groups = [{"params": [B for _, B in factors], "lr_ratio": lora.lr_ratio}]
        if lora.train_A:
            groups.insert(0, {"params": [A for A, _ in factors], "lr_ratio": 1.0})
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "lr_ratio_B": lora.lr_ratio}
    if lora.optimizer == "lora_muon":
        return LoRAMuon(model, momentum=config.beta1, **common)
    if lora.optimizer == "scaled_adam":
        return ScaledAdam(model, betas=betas, eps=config.eps, **common)
    return LoRARite(model, betas=betas, eps=config.eps, **common)


class AdapterState:
    """The factors of a model's adapters, as a checkpoint holds them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Tensor]:
        return lora_state_dict(self._model)


class FineTuner(Trainer):
    """A run whose model is a frozen checkpoint with adapters.

    Raises:
        ValueError: a target that cannot have an adapter, one without gradients (after the first step), or a run
            directory that holds the trained model itself, which a restart or the export would remove.
    """

    adapters = True
    outputs = (*Trainer.outputs, "merged", "adapter")

    def __init__(self, config: TrainConfig, *, title: str = "finetune", quiet: bool = False) -> None:
        if config.lora.rank < 1:
            raise ValueError(f"lora.rank must be at least 1 to fine-tune, got {config.lora.rank}")
        self.base = load_model(config.lora.checkpoint)
        if self.base.model.config != config.model:
            raise ValueError(
                f"lora.checkpoint must have the shape of section model, got another one in {self.base.path}"
            )
        self._checked = False
        super().__init__(config, title=title, quiet=quiet)
        if self.base.inputs.tokenizer != self.inputs.tokenizer:
            raise ValueError(
                f"data.path must have the tokenizer that {self.base.path} was trained with, "
                f"got another one in {config.data.path}"
            )
        self.inputs = replace(self.inputs, base=self.base.weights_hash)
        self.stored = AdapterState(self.model)

    def _model(self) -> Decoder:
        lora, model = self.config.lora, self.base.model.to(self.device)
        # The loss op takes this layer's weight and never calls it for the logits.
        head = "embedding" if model.head is None else "head"
        if head in lora.target_names:
            tied = " (model.tie_head)" if model.head is None else ""
            raise ValueError(f"lora.targets must not name the layer whose weight is the head's{tied}, got {head!r}")
        inject_lora(
            model, lora.target_names, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, seed=self.config.run.seed
        )
        for layer in lora_layers(model).values():
            layer.factors()[0].requires_grad_(lora.train_A)
        return model.train()

    def _begin(self) -> None:
        own = {(self.out / name).resolve() for name in self.outputs}
        if own & set(self.base.path.resolve().parents):
            raise ValueError(f"run.out must not hold the model of lora.checkpoint, got {self.out} for {self.base.path}")
        super()._begin()

    def _optimizer(self) -> torch.optim.Optimizer:
        return build_lora_optimizer(self.model, self.config.lora, self.config.optimizer)

    def step(self, step: int) -> tuple[StepResult, StepTimer]:
        """As the trainer's; a step that the optimizer itself skipped is none that was applied."""
        reached: set[str] = set()
        hooks = [] if self._checked else self._watch_gradients(reached)
        before = getattr(self.optimizer, "skipped", None)
        before = None if before is None else before.clone()
        result, timer = super().step(step)
        if before is not None and bool(before != self.optimizer.skipped):  # type: ignore[attr-defined]
            result = replace(result, applied=False)
        for hook in hooks:
            hook.remove()
        without = [] if self._checked else [name for name in lora_layers(self.model) if name not in reached]
        if without:
            raise ValueError(f"lora.targets must name layers that the loss depends on, got no gradient for {without}")
        self._checked = True
        return result, timer

    def _watch_gradients(self, reached: set[str]) -> list[Any]:
        """Hooks that put into `reached` the layers whose adapters get a gradient."""
        return [
            factor.register_hook(lambda _, name=name: reached.add(name))
            for name, layer in lora_layers(self.model).items()
            for factor in layer.factors()
            if factor.requires_grad
        ]

    def _finish(self, signum: int | None) -> TrainResult:
        result = super()._finish(signum)
        if result.finished:
            self.parallel.on_main(self.export)
        return result

    def export(self) -> Path:
        """Write merged/ and adapter/ below the run directory; returns the step directory of the merged model."""
        save_adapter(self.model, self.config.lora, self.out / "adapter")
        folder = self.out / "merged"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        shutil.copyfile(self.out / "tokenizer.json", folder / "tokenizer.json")
        meta = {
            "config": asdict(replace(self.config, lora=LoraConfig())),
            "inputs": asdict(self.base.inputs),
            "merged": {"base": self.base.weights_hash, "lora": asdict(self.config.lora)},
            "versions": {"torch": torch.__version__},
        }
        weights = {name: tensor.detach().contiguous() for name, tensor in merged_state_dict(self.model).items()}
        return save_checkpoint(
            folder / "checkpoints", Checkpoint(self.state.step, {"model": weights}, meta), keep_last=1
        )


def save_adapter(model: nn.Module, lora: LoraConfig, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, as PEFT names and fills them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().cpu() for k, v in lora_state_dict(model).items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    settings = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.target_names,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def finetune(config: TrainConfig, *, title: str = "finetune", quiet: bool = False) -> TrainResult:
    """Run `config` to its end; resumes what config.run.out holds. Raises what effkern.train.loop.train raises."""
    return FineTuner(config, title=title, quiet=quiet).run()


def finetune_config(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    optimizer: str = "lora_rite",
    rank: int = 8,
    alpha: float = 16.0,
    steps: int = 200,
    lr: float = 0.0,
    batch_size: int = 0,
    seq_len: int = 0,
    seed: int = 0,
    **lora: Any,
) -> TrainConfig:
    """The config of a fine-tuning run: the model's shape, the optimizer's defaults; 0 takes what was used before.

    Raises:
        ValueError: a value breaks a rule of its section. CheckpointError: there is no intact checkpoint.
    """
    base = load_model(checkpoint)
    before = base.meta["config"]["data"]
    if rank < 1:
        raise ValueError(f"lora.rank must be at least 1 to fine-tune, got {rank}")
    adapters = LoraConfig(checkpoint=str(checkpoint), rank=rank, alpha=alpha, optimizer=optimizer, **lora)
    chosen = DEFAULTS[optimizer]
    return TrainConfig(
        model=base.model.config,
        data=DataConfig(
            path=str(data),
            seq_len=seq_len or before["seq_len"],
            batch_size=batch_size or before["batch_size"],
            seed=seed,
        ),
        optimizer=replace(chosen, lr=lr or chosen.lr, warmup_steps=min(chosen.warmup_steps, steps // 5)),
        schedule=ScheduleConfig(steps=steps),
        run=RunConfig(out=str(out), seed=seed),
        lora=adapters,
    )
