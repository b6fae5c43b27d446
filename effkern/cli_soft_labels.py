"""`effkern data soft-labels`: what will be written, a progress bar, and how to go on after a stop."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from effkern.train.progress import reporter_for
from effkern.train.signals import StopRequest
from effkern.train.soft_labels import LabelOptions, SoftLabelJob

if TYPE_CHECKING:
    from effkern.data.soft_labels_writer import WriteResult


@dataclass
class Command:
    """Run a teacher over a packed dataset and write a cache of soft labels: ids, values, tail mass and lse per token.

    A size estimate comes first. The same command goes on behind the last finished file of an interrupted run.
    `effkern train --teacher.cache OUT` trains with it in place of a live teacher.
    """

    teacher: Path
    """Run directory or step directory."""
    data: Path
    """Packed dataset with the teacher's tokenizer."""
    out: Path
    """Folder to create."""
    options: Annotated[LabelOptions, tyro.conf.arg(name="")] = field(default_factory=LabelOptions)
    dry_run: bool = False
    """Print the size estimate and stop."""
    overwrite: bool = False
    """Throw away a cache in `out` that was made in another way."""


def soft_labels(command: Annotated[Command, tyro.conf.arg(name="")]) -> int:
    """Run a teacher over a packed dataset and write a cache of soft labels."""
    job = SoftLabelJob(command.teacher, command.data, command.options)
    estimate = job.estimate(command.out)
    print(estimate.render(), flush=True)
    if command.dry_run:
        return 0
    present = sum(file.stat().st_size for file in command.out.glob("labels-*.bin"))
    if not command.overwrite and estimate.bytes - present > estimate.free:
        raise ValueError(
            f"soft labels: out must have room for about {estimate.bytes - present:,} bytes, got {estimate.free:,} free"
        )
    start = time.monotonic()
    with StopRequest() as stop:
        reporter = reporter_for("soft-labels", job.spec.num_windows, 0)
        try:
            result = job.write(
                command.out,
                overwrite=command.overwrite,
                progress=lambda done, total: reporter.update(done, f"of {total:,} windows"),
                stop=lambda: stop.signum is not None,
            )
        finally:
            reporter.close()
    if result.manifest is None:
        print(f"stopped by signal {stop.signum}; finished files are kept, the same command goes on")
        return 128 + (stop.signum or 0)
    print(_summary(command.out, result, time.monotonic() - start))
    return 0


def _summary(out: Path, result: "WriteResult", seconds: float) -> str:
    manifest = result.manifest
    assert manifest is not None
    tokens = manifest.spec.num_tokens
    kept = f", {result.kept} of {len(manifest.shards)} files kept" if result.kept else ""
    speed = result.windows * manifest.spec.seq_len / seconds
    return (
        f"{out}: {tokens:,} tokens, {manifest.entries / tokens:.2f} entries and {manifest.bytes / tokens:.1f} bytes a "
        f"token, {manifest.bytes:,} bytes, {speed:,.0f} tokens/s{kept}; hash {manifest.hash[:12]}"
    )
