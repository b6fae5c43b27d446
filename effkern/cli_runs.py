"""`effkern runs list|show|compare|plot`: the run directories below a folder."""

import json as json_
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from effkern.train.runs import changed, compare_runs, curves_of, find_runs, names_of, read_run

if TYPE_CHECKING:
    from effkern.train.runs import Run

Folder = Annotated[Path, tyro.conf.Positional]
Folders = Annotated[tuple[Path, ...], tyro.conf.Positional]


def list_runs(folder: Folder = Path("runs"), json: bool = False) -> int:
    """One line a run: running, finished or stopped, steps done, size, tokens, the last validation, time.

    Args:
        folder: where to look, with everything below it.
        json: print JSON.
    """
    runs = [read_run(path) for path in find_runs(folder)]
    if json:
        print(json_.dumps([{k: v for k, v in run.as_dict().items() if k not in ("evals", "config")} for run in runs]))
        return 0
    table = _table("run", "status", "steps", "parameters", "tokens", "loss", "accuracy", "bits/byte", "time")
    for run in runs:
        steps = f"{run.step}/{run.steps}" if run.steps else str(run.step)
        status = f"{run.status}, damaged" if run.problems else run.status
        parameters = f"{run.parameters:,}" if run.parameters else "-"
        table.add_row(str(run.path), status, steps, parameters, *_figures(run))
    _print(table)
    return 0


def show(run: Folder, json: bool = False) -> int:
    """What one run was asked to do, and its validations.

    Args:
        run: its directory.
        json: print JSON.
    """
    found = read_run(run)
    if json:
        print(json_.dumps(found.as_dict()))
        return 0
    print(f"{run}: step {found.step} of {found.steps}, {found.status}{f' by {found.process}' if found.process else ''}")
    for problem in found.problems:
        print(problem)
    settings = _table("setting (not the default)", "value")
    for name, value in changed(found.config).items():
        settings.add_row(name, str(value))
    evals = _table("step", "tokens", "loss", "accuracy", "bits/byte")
    for record in found.evals:
        evals.add_row(
            str(record["step"]), f"{record['tokens']:,}", f"{record['loss']:.4f}", f"{100 * record['accuracy']:.2f}%",
            f"{record['bits_per_byte']:.4f}",
        )  # fmt: skip
    _print(settings, evals)
    return 0


def compare(runs: Folders, json: bool = False) -> int:
    """Settings that differ, last figures, and losses where all have seen as many tokens.

    Args:
        runs: two or more run directories; differences are to the first.
        json: print JSON.
    """
    found = [read_run(path) for path in runs]
    report = compare_runs(found)
    if json:
        print(json_.dumps(report))
        return 0
    table = _table("", *report["runs"])
    for name, values in report["settings"].items():
        table.add_row(name, *map(str, values))
    columns = [_figures(run) for run in found]
    for i, name in enumerate(("tokens", "loss", "accuracy", "bits/byte", "time")):
        table.add_row(name, *(column[i] for column in columns))
    equal = report["equal_tokens"]
    table.add_row(f"loss at {equal['tokens']:,} tokens", *map(_number, equal["loss"]))
    table.add_row("  minus the first", *map(_number, equal["minus_first"]))
    _print(table)
    return 0


def plot(
    runs: Folders,
    out: Path = Path("runs.png"),
    x: Literal["tokens", "step"] = "tokens",
    y: Literal["loss", "accuracy", "bits_per_byte"] = "loss",
) -> int:
    """Draw the validations of several runs into one picture.

    Args:
        runs: run directories, or folders with some below.
        out: file to write; its ending chooses PNG, SVG or PDF.
        x: what goes along.
        y: what goes up.
    """
    from effkern.train.plots import plot_curves

    found = [read_run(path) for folder in runs for path in find_runs(folder)]
    curves = curves_of(found, names_of(found), x, y) if found else {}
    if not curves:
        raise ValueError(f"runs plot: runs must hold a validation, got none below {', '.join(map(str, runs))}")
    labels = {
        "loss": "validation loss, nats per token",
        "accuracy": "next-token accuracy",
        "bits_per_byte": "bits/byte",
    }
    plot_curves(curves, out, x, labels[y])
    print(f"{out}: {len(curves)} runs")
    return 0


def runs(arguments: Sequence[str]) -> int:
    """The subcommands of `effkern runs`."""
    commands = {"list": list_runs, "show": show, "compare": compare, "plot": plot}
    return tyro.extras.subcommand_cli_from_dict(commands, prog="effkern runs", args=list(arguments))


def _table(*columns: str) -> Table:
    table = Table()
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    return table


def _figures(run: "Run") -> list[str]:
    f = run.figures()
    return [
        "-" if f["tokens"] is None else f"{f['tokens']:,}",
        _number(f["loss"]),
        "-" if f["accuracy"] is None else f"{100 * f['accuracy']:.2f}%",
        _number(f["bits_per_byte"]),
        "-" if f["wall_s"] is None else f"{f['wall_s']:,.0f} s",
    ]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _print(*tables: Table) -> None:
    console = Console()
    if not console.is_terminal:
        # A pipe has no width to fit into.
        console = Console(width=240)
    for table in tables:
        console.print(table)
