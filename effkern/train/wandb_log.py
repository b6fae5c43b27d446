"""Weights & Biases, for runs that name a project; needs the extra `wandb`, which nothing else imports."""

import json
import os
import secrets
from pathlib import Path
from typing import Any


def require_wandb(project: str) -> Any:
    """The module. Raises ImportError naming the extra."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"run.wandb={project!r} needs the extra wandb: pip install 'effkern[wandb]'") from error
    return wandb


class WandbLog:
    """The records of a run as those of one run there: wandb.json keeps its id, so that a resumed run goes on in it.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, project: str, folder: Path, *, resumed: bool, settings: dict[str, Any]) -> None:
        self._run = require_wandb(project).init(
            project=project,
            name=folder.name,
            id=_run_id(folder / "wandb.json", resumed),
            resume="allow",
            dir=str(folder),
            config=settings,
        )
        # Steps since the last checkpoint come again after a crash, and wandb's own counter never goes back.
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        if numbers:
            self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path, resumed: bool) -> str:
    if resumed and path.exists():
        return json.loads(path.read_text())["id"]
    name = secrets.token_hex(8)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"id": name}))
    os.replace(temporary, path)
    return name
