"""The trainer: SALT's two stages, baseline and RKD, with checkpoints that survive a crash."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effkern.train.checkpoint import CheckpointError as CheckpointError
    from effkern.train.config import TrainConfig as TrainConfig
    from effkern.train.evaluation import EvalResult as EvalResult
    from effkern.train.evaluation import evaluate as evaluate
    from effkern.train.loop import Trainer as Trainer
    from effkern.train.loop import TrainingDiverged as TrainingDiverged
    from effkern.train.loop import TrainResult as TrainResult
    from effkern.train.loop import train as train
    from effkern.train.presets import PRESETS as PRESETS
    from effkern.train.restore import load_model as load_model

# Names are loaded when they are used: `effkern train --dry-run` needs neither safetensors nor tokenizers.
_HOME = {
    "CheckpointError": "checkpoint",
    "TrainConfig": "config",
    "EvalResult": "evaluation",
    "evaluate": "evaluation",
    "Trainer": "loop",
    "TrainingDiverged": "loop",
    "TrainResult": "loop",
    "train": "loop",
    "PRESETS": "presets",
    "load_model": "restore",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'effkern.train' has no attribute {name!r}")
    return getattr(import_module(f"effkern.train.{_HOME[name]}"), name)
