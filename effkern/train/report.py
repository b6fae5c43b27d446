"""The demo's report: numbers to report.json, words to report.md, curves to curves.png."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy
import torch

from effkern.data import PackedDataset, val_batches
from effkern.models import count_parameters, forward_flops, generate
from effkern.train.compare import (
    confidence_buckets,
    first_reaching,
    paired_difference,
    summarise,
    token_losses,
    value_at,
)
from effkern.train.config import TrainConfig
from effkern.train.demo_plan import DemoPlan
from effkern.train.device import choose_device, choose_precision
from effkern.train.loop import TrainResult
from effkern.train.plots import plot_comparison
from effkern.train.report_text import render_markdown
from effkern.train.restore import LoadedModel, load_model, weights_digest
from effkern.train.schedules import teacher_steps


def with_flops(evals: list[dict[str, Any]], student: float, teacher: float, switch_tokens: int) -> list[dict[str, Any]]:
    """Validation records with the cost so far: 3 forwards of the student, and 1 of the teacher up to the switch."""
    keys = ("step", "tokens", "loss", "accuracy", "bits_per_byte")
    return [
        {
            **{key: e[key] for key in keys},
            "flops": 3 * student * e["tokens"] + teacher * min(e["tokens"], switch_tokens),
        }
        for e in evals
    ]


def _timing(result: TrainResult) -> dict[str, float]:
    state = result.state
    steps = max(1, state.step)
    return {
        "wall_s": state.wall_s,
        "cpu_s": state.cpu_s,
        "step_s": state.timed_s / steps,
        "tokens_per_s": state.tokens / state.timed_s if state.timed_s else 0.0,
        "loss_op_share": result.loss_op_share,
        "teacher_share": result.teacher_share,
    }


def _samples(loaded: dict[str, LoadedModel], plan: DemoPlan, dataset: PackedDataset, seed: int) -> list[dict[str, str]]:
    tokenizer = dataset.tokenizer()
    rows = []
    for prompt in plan.prompts:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
        row = {"prompt": prompt}
        for name, item in loaded.items():
            start = ids.to(next(item.model.parameters()).device)
            tokens = generate(
                item.model, start, plan.sample_tokens, temperature=0.7, top_p=0.95, seed=seed, eos=dataset.eos_id
            )
            row[name] = tokenizer.decode(tokens[0, ids.shape[1] :].tolist())
        rows.append(row)
    return rows


def _findings(runs: dict[str, Any], losses: dict[str, Any], switch: int, total: int) -> dict[str, Any]:
    """Every comparison of the report, as numbers; `switch` and `total` are in tokens."""
    base, salt = runs["baseline"]["evals"], runs["salt"]["evals"]
    budget = base[-1]["flops"]
    return {
        "at_switch": {
            "tokens": switch,
            "baseline": value_at(base, "tokens", switch),
            "salt": value_at(salt, "tokens", switch),
        },
        "at_70_percent": {
            "baseline": value_at(base, "tokens", 0.7 * total),
            "salt": value_at(salt, "tokens", 0.7 * total),
        },
        "final": {
            **{name: runs[name]["final"] for name in runs},
            "salt_minus_baseline": paired_difference(losses["baseline"]["ce"], losses["salt"]["ce"]),
        },
        "equal_flops": {
            "flops": budget,
            "baseline": base[-1]["loss"],
            "salt": value_at(salt, "flops", budget),
            "salt_extra_flops_share": salt[-1]["flops"] / budget - 1,
            "salt_flops_share_to_reach_baseline_final": (
                None if (flops := first_reaching(salt, "flops", base[-1]["loss"])) is None else flops / budget
            ),
            "teacher_training_flops_share": runs["teacher"]["evals"][-1]["flops"] / budget,
        },
        "buckets_of_teacher_confidence": confidence_buckets(losses),
    }


def write_report(
    out: Path,
    plan: DemoPlan,
    configs: dict[str, TrainConfig],
    results: dict[str, TrainResult],
    dataset: PackedDataset,
    *,
    data_seconds: float,
    start: float,
) -> dict[str, Any]:
    """Evaluate the trained models on the same text, sample from them, and write the three files; returns the numbers.

    Everything outside the keys `timing` and `versions` depends on seed and corpus alone.
    """
    salt = configs["salt"]
    device = choose_device(salt.run.device)
    dtype = choose_precision(salt.run.precision, device)
    per_step = salt.data.batch_size * salt.data.seq_len
    switch, total = teacher_steps(salt.schedule) * per_step, salt.schedule.steps * per_step
    forward = {name: forward_flops(config.model, config.data.seq_len).total for name, config in configs.items()}
    loaded = {name: load_model(config.run.out, device) for name, config in configs.items()}
    bytes_per_token = dataset.bytes_per_token("val")
    losses = {
        name: token_losses(item.model, val_batches(dataset, salt.data.seq_len, 16, plan.val_tokens), dtype)
        for name, item in loaded.items()
    }
    runs: dict[str, Any] = {}
    for name, result in results.items():
        extra = forward["teacher"] if name == "salt" else 0.0
        runs[name] = {
            "parameters": count_parameters(configs[name].model),
            "steps": result.state.step,
            "tokens": result.state.tokens,
            "skipped_steps": result.state.skipped,
            "weights_sha256": weights_digest(loaded[name].model),
            "final": summarise(losses[name], bytes_per_token),
            "evals": with_flops(result.evals, forward[name], extra, switch),
        }
    report: dict[str, Any] = {
        "seed": salt.run.seed,
        "corpus": {
            "sources": list(plan.sources),
            "manifest_hash": dataset.hash,
            "train_tokens": dataset.num_tokens("train"),
        },
        "method": {
            "omega": salt.schedule.omega,
            "teacher_temperature": salt.teacher.temperature,
            "transition": salt.schedule.transition,
            "kd_steps": salt.schedule.kd_steps,
            "steps": salt.schedule.steps,
            "tokens": total,
            "precision": str(dtype).removeprefix("torch."),
        },
        "runs": runs,
        "findings": _findings(runs, losses, switch, total),
        "samples": _samples(loaded, plan, dataset, salt.run.seed),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
    }
    plot_comparison(runs, switch, out / "curves.png")
    report["timing"] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {device}",
        "data_s": data_seconds,
        "total_s": time.monotonic() - start,
        "runs": {name: _timing(result) for name, result in results.items()},
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text(render_markdown(report))
    return report
