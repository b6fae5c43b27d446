"""The run's log: one JSON object a line, and TensorBoard. A resumed run continues it without duplicates."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a log; a last line cut short by a crash is left out."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def truncate_log(path: Path, step: int) -> None:
    """Drop the records after `step` completed steps, atomically."""
    if not path.exists():
        return
    kept = [record for record in read_log(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(temporary, path)


class RunLog:
    """Appends records of kind `train` or `eval` to log.jsonl; floats are written exactly.

    TensorBoard, the project `wandb` (with the run's `settings`) and `watch` get every record, too.
    """

    def __init__(
        self, folder: Path, step: int, tensorboard: bool, *, wandb: str = "", settings: dict[str, Any] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.watch: Callable[[str, int, dict[str, Any]], None] | None = None
        self._wandb: Any = None
        if wandb:
            from effkern.train.wandb_log import WandbLog

            self._wandb = WandbLog(wandb, folder, resumed=step > 0, settings=settings or {})
        self.path = folder / "log.jsonl"
        truncate_log(self.path, step)
        self._file = open(self.path, "a")  # noqa: SIM115
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """`step` is the number of completed steps."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.write(kind, step, values)
        if self.watch is not None:
            self.watch(kind, step, values)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


class NoLog:
    """The log of a rank that writes nothing."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes nothing."""

    def close(self) -> None:
        """Nothing is held."""
