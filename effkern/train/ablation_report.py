"""The table and the plot of an ablation, from its run directories."""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from effkern.data import PackedDataset, val_batches
from effkern.models import count_parameters
from effkern.train.config import TrainConfig
from effkern.train.device import choose_device, choose_precision
from effkern.train.estimate import estimate
from effkern.train.evaluation import evaluate
from effkern.train.features import tokens_of
from effkern.train.plots import plot_ablation
from effkern.train.restore import load_model
from effkern.train.runs import read_run
from effkern.train.schedules import teacher_steps


def write_report(out: Path, runs: Mapping[str, Sequence[TrainConfig]], dataset: PackedDataset) -> dict[str, Any]:
    """ablation.json, ablation.md and ablation.png in `out`; returns what the first holds.

    Every model is measured on the validation text of `dataset`, also one that was trained on other data. Differences
    are to the first arm with the same seed; their standard error says how far other seeds would move them.
    """
    rows = {name: [_measure(config, dataset) for config in configs] for name, configs in runs.items()}
    base = next(iter(rows.values()))
    first = next(iter(runs.values()))[0]
    report = {
        "tokens": tokens_of(first),
        "seeds": [config.run.seed for config in next(iter(runs.values()))],
        "validation_tokens": base[0]["tokens"],
        "arms": {name: _summary(runs[name][0], found, base) for name, found in rows.items()},
        "runs": rows,
    }
    _replace(out / "ablation.json", json.dumps(report, indent=1))
    _replace(out / "ablation.md", markdown(report))
    curves = {
        name: [_curve(config) for config in configs]
        for name, configs in runs.items()
        # Another text's losses cannot stand in one picture.
        if all(config.data.path == first.data.path for config in configs)
    }
    plot_ablation(report["arms"], curves, out / "ablation.png")
    return report


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _measure(config: TrainConfig, dataset: PackedDataset) -> dict[str, Any]:
    device = choose_device(config.run.device)
    loaded = load_model(config.run.out, device)
    if loaded.inputs.tokenizer != dataset.manifest.tokenizer.sha256:
        raise ValueError(f"features must leave the tokenizer as it is, got another one in {config.run.out}")
    batches = val_batches(dataset, config.data.seq_len, config.data.micro_rows, config.run.eval_tokens or None)
    dtype = choose_precision(config.run.precision, device)
    result = evaluate(loaded.model, batches, dataset.bytes_per_token("val"), dtype)
    state = json.loads((Path(config.run.out) / "result.json").read_text())["state"]
    timed = state["timed_s"]
    return {
        "out": config.run.out,
        "seed": config.run.seed,
        **asdict(result),
        "wall_s": state["wall_s"],
        "teacher_share": state["teacher_s"] / timed if timed else 0.0,
    }


def _summary(config: TrainConfig, rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> dict[str, Any]:
    device = choose_device(config.run.device)
    teacher = None
    if teacher_steps(config.schedule) and config.teacher.checkpoint:
        teacher = load_model(config.teacher.checkpoint).model.config
    cost = estimate(config, choose_precision(config.run.precision, device), teacher)
    differences = [row["loss"] - other["loss"] for row, other in zip(rows, base)]
    return {
        "parameters": count_parameters(config.model),
        "flops": cost.student_flops + cost.teacher_flops,
        "loss": _mean_and_error([row["loss"] for row in rows]),
        "difference": _mean_and_error(differences),
        "accuracy": _mean_and_error([row["accuracy"] for row in rows]),
        "wall_s": _mean_and_error([row["wall_s"] for row in rows]),
        "teacher_share": statistics.mean(row["teacher_share"] for row in rows),
    }


def _mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its standard error; None for one seed."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.mean(values), "error": error}


def _curve(config: TrainConfig) -> list[tuple[float, float]]:
    return [(record["tokens"], record["loss"]) for record in read_run(Path(config.run.out)).evals]


def markdown(report: dict[str, Any]) -> str:
    """The table, with what it was measured on."""
    seeds = report["seeds"]
    lines = [
        f"Each run: {report['tokens']:,} tokens, seeds {seeds[0]} to {seeds[-1]}, "
        f"{report['validation_tokens']:,} tokens of validation. +- is the standard error over seeds; differences are "
        "to the first row with the same seed.",
        "",
        "| | parameters | FLOPs | loss, nats | minus the first | accuracy | seconds | teacher's share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, (name, arm) in enumerate(report["arms"].items()):
        difference = _shown(arm["difference"], "{:+.4f}") if number else "-"
        share = f"{100 * arm['teacher_share']:.0f}%" if arm["teacher_share"] else "-"
        lines.append(
            f"| {name} | {arm['parameters']:,} | {arm['flops']:.3g} | {_shown(arm['loss'])} | {difference} | "
            f"{100 * arm['accuracy']['mean']:.2f}% | {arm['wall_s']['mean']:.0f} | {share} |"
        )
    return "\n".join([*lines, "", "![curves](ablation.png)", ""])


def _shown(value: dict[str, float | None], form: str = "{:.4f}") -> str:
    error = value["error"]
    return form.format(value["mean"]) + (f" +- {error:.4f}" if error is not None else "")
