"""`effkern demo --finetune`: the demo's student, adapted to docstrings alone, with AdamW and with LoRA-RITE.

Both get the same adapters, batches and steps, and each its best learning rate of a grid of the same size. In the demo's
folder: finetune/data (docstrings, the student's tokenizer), a run directory for each learning rate, finetune.json,
finetune.md and finetune.png. An interrupted comparison goes on where it stopped.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from effkern.data import PackedDataset, build_dataset
from effkern.nn.lora import lora_layers
from effkern.train.compare import paired_difference, summarise, token_losses
from effkern.train.config import TrainConfig
from effkern.train.demo import DemoInterrupted, run_demo
from effkern.train.demo_plan import DemoPlan
from effkern.train.device import choose_device, choose_precision
from effkern.train.finetune import FineTuner, finetune_config
from effkern.train.loop import TrainResult
from effkern.train.plots import plot_finetune
from effkern.train.restore import load_model

NAMES = {"adamw": "AdamW", "lora_rite": "LoRA-RITE"}


@dataclass(frozen=True)
class FinetunePlan:
    """What is compared."""

    grid: Mapping[str, tuple[float, ...]]
    """Learning rates of each optimizer, as many for one as for the other."""
    sources: tuple[str, ...] = ("stdlib-docs",)
    steps: int = 120
    rank: int = 8
    eval_every: int = 20
    val_tokens: int = 32768
    """Of the final comparison."""


DEFAULT = FinetunePlan({"adamw": (3e-3, 1e-2, 3e-2), "lora_rite": (1e-3, 3e-3, 1e-2)})


def run_finetune_demo(
    out: str | Path = "runs/demo",
    *,
    seed: int = 0,
    plan: FinetunePlan = DEFAULT,
    demo: DemoPlan | None = None,
    quiet: bool = False,
) -> str:
    """Fine-tune the demo's student (`out`/salt, trained first if it is not there); returns the text of finetune.md.

    Raises:
        DemoInterrupted: SIGINT or SIGTERM; the same call goes on.
        ValueError: `out` holds files that are not a demo's, or a comparison of another student or on other sources; or
            the grids differ in length.
    """
    if len({len(rates) for rates in plan.grid.values()}) != 1:
        raise ValueError(f"finetune: grid must have as many rates for each optimizer, got {dict(plan.grid)}")
    out, start = Path(out), time.monotonic()
    if not (out / "salt" / "result.json").exists():
        run_demo(out, seed=seed, plan=demo, quiet=quiet)
    folder = out / "finetune"
    dataset = _dataset(out, folder, plan, seed)
    configs = _configs(out, folder, dataset, plan, seed)
    results: dict[str, dict[float, TrainResult]] = {}
    for name, by_rate in configs.items():
        results[name] = {}
        for rate, config in by_rate.items():
            result = FineTuner(config, title=f"{name} {rate:g}", quiet=quiet).run()
            if result.signum is not None:
                raise DemoInterrupted(result.signum, out)
            results[name][rate] = result
    report = _report(out, dataset, configs, results, plan, seed, time.monotonic() - start)
    (out / "finetune.json").write_text(json.dumps(report, indent=1) + "\n")
    text = render(report)
    (out / "finetune.md").write_text(text)
    plot_finetune(report, out / "finetune.png")
    return text


def _dataset(out: Path, folder: Path, plan: FinetunePlan, seed: int) -> PackedDataset:
    """Docstrings in the student's tokens. The split is by file and seed as in the demo's corpus: what validates here
    was never trained on there. Raises ValueError, and leaves all as it is, where `folder` is of another one."""
    path = folder / "data"
    tokenizer = out / "salt" / "tokenizer.json"
    try:
        dataset = PackedDataset(path)
    except (OSError, ValueError):
        pass
    else:
        student = dataset.manifest.tokenizer.sha256 == load_model(out / "salt").inputs.tokenizer
        sources = [source.name for source in dataset.manifest.sources]
        if student and sources == list(plan.sources):
            return dataset
        got = f"sources {sources}" if student else "another tokenizer"
        raise ValueError(
            f"finetune: {folder} must hold runs on {list(plan.sources)} of the student in {out}, got {got}; remove it"
        )
    return build_dataset(path, plan.sources, tokenizer=tokenizer, seed=0, overwrite=True)


def _configs(
    out: Path, folder: Path, dataset: PackedDataset, plan: FinetunePlan, seed: int
) -> dict[str, dict[float, TrainConfig]]:
    found: dict[str, dict[float, TrainConfig]] = {}
    for name, rates in plan.grid.items():
        for rate in rates:
            config = finetune_config(
                out / "salt", dataset.path, folder / f"{name}-{rate:g}", optimizer=name, rank=plan.rank, lr=rate,
                steps=plan.steps, seed=seed,
            )  # fmt: skip
            student = load_model(out / "salt").meta["config"]["run"]
            run = replace(
                config.run, device=student["device"], precision=student["precision"], eval_every=plan.eval_every,
                eval_tokens=plan.val_tokens // 2, checkpoint_every=0, tensorboard=False, plot=False,
            )  # fmt: skip
            found.setdefault(name, {})[rate] = replace(config, run=run)
    return found


def _report(
    out: Path,
    dataset: PackedDataset,
    configs: Mapping[str, Mapping[float, TrainConfig]],
    results: Mapping[str, Mapping[float, TrainResult]],
    plan: FinetunePlan,
    seed: int,
    seconds: float,
) -> dict[str, Any]:
    """The numbers. The learning rate is chosen by the validation loss of the runs; the final one is on more text."""
    from effkern.data import val_batches

    chosen = {name: min(runs, key=lambda rate: runs[rate].evals[-1]["loss"]) for name, runs in results.items()}
    first = next(iter(next(iter(configs.values())).values()))
    device = choose_device(first.run.device)
    dtype = choose_precision(first.run.precision, device)

    def losses(path: Path) -> dict[str, Any]:
        model = load_model(path, device).model
        return token_losses(model, val_batches(dataset, first.data.seq_len, 16, plan.val_tokens), dtype)

    measured = {"student": losses(out / "salt")}
    measured |= {name: losses(results[name][rate].out / "merged") for name, rate in chosen.items()}
    bytes_per_token = dataset.bytes_per_token("val")
    layers = FineTuner(first, quiet=True).model
    return {
        "seed": seed,
        "steps": plan.steps,
        "rank": plan.rank,
        "tokens": plan.steps * first.data.batch_size * first.data.seq_len,
        "adapter_parameters": sum(x.numel() for layer in lora_layers(layers).values() for x in layer.factors()),
        "sources": list(plan.sources),
        "best": chosen,
        "final": {name: summarise(found, bytes_per_token) for name, found in measured.items()},
        "rite_minus_adamw": paired_difference(measured["adamw"]["ce"], measured["lora_rite"]["ce"]),
        "runs": {
            name: {
                f"{rate:g}": {
                    "evals": [{key: e[key] for key in ("step", "tokens", "loss")} for e in result.evals],
                    "skipped_steps": result.state.skipped,
                    "wall_s": result.state.wall_s,
                    "cpu_s": result.state.cpu_s,
                }
                for rate, result in by_rate.items()
            }
            for name, by_rate in results.items()
        },
        "seconds": seconds,
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]]


def render(report: Mapping[str, Any]) -> str:
    """finetune.md from the numbers alone."""
    final, gap = report["final"], report["rite_minus_adamw"]
    size, error = gap["difference"], gap["validation_standard_error"]
    if abs(size) <= 2 * error:
        verdict = f"At their best learning rates the two do not differ on this text ({size:+.4f} +- {error:.4f} nats)."
    else:
        better, worse = ("LoRA-RITE", "AdamW") if size < 0 else ("AdamW", "LoRA-RITE")
        verdict = f"At its best learning rate {better} ends {abs(size):.4f} +- {error:.4f} nats below {worse}."
    lines = ["# The demo's student, adapted by LoRA", "", f"- {verdict}"]
    edges = [
        NAMES[name] for name, rate in report["best"].items()
        if f"{rate:g}" in [list(report["runs"][name])[i] for i in (0, -1)]
    ]  # fmt: skip
    if edges:
        lines.append(
            f"- The best rate of {' and '.join(edges)} is at the edge of its grid: a wider one might be better."
        )
    lines += [
        "- This is ONE seed: +- is the standard error over validation sequences.",
        "",
        "![curves](finetune.png)",
        "",
        "## Validation loss after the last step, by learning rate (nats per token)",
        "",
    ]
    rows = []
    for name, runs in report["runs"].items():
        cells = [f"{rate}: {run['evals'][-1]['loss']:.4f}" for rate, run in runs.items()]
        rows.append([NAMES[name], *cells])
    width = max(len(row) for row in rows)
    lines += _table(["optimizer", *[f"rate {i + 1}" for i in range(width - 1)]], rows)
    lines += ["", "## Final models, adapters merged, on more of the same text", ""]
    rows = []
    for name, numbers in final.items():
        label = NAMES.get(name, "student before")
        rate = f"{report['best'][name]:g}" if name in report["best"] else "-"
        rows.append(
            [
                label,
                rate,
                f"{numbers['loss']:.4f}",
                f"{100 * numbers['accuracy']:.2f}%",
                f"{numbers['bits_per_byte']:.4f}",
            ]
        )
    lines += _table(["model", "learning rate", "loss, nats/token", "accuracy", "bits/byte"], rows)
    cpu = {name: sum(run["cpu_s"] for run in runs.values()) for name, runs in report["runs"].items()}
    lines += [
        "",
        f"{report['adapter_parameters']:,} adapter parameters (rank {report['rank']}), {report['steps']} steps, "
        f"{report['tokens']:,} tokens of {', '.join(report['sources'])} a run, seed {report['seed']}; "
        f"{report['seconds']:.0f} s in all, CPU time of the runs: "
        + ", ".join(f"{NAMES[name]} {seconds:.0f} s" for name, seconds in cpu.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"
