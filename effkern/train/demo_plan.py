"""What the demo is to do."""

from dataclasses import dataclass

from effkern.train.config import TrainConfig


@dataclass(frozen=True)
class DemoPlan:
    """What the demo trains and on which text."""

    teacher: TrainConfig
    student: TrainConfig
    """The SALT arm; the baseline is the same without its teacher."""
    sources: tuple[str, ...] = ("stdlib",)
    vocab_size: int = 4096
    max_bytes: int | None = None
    val_tokens: int = 65536
    """Of the final comparison."""
    prompts: tuple[str, ...] = ("def read_lines(path):\n", "import os\nimport ", '    """Return the ')
    sample_tokens: int = 40
