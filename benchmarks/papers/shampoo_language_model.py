"""AdamW, Muon, one-sided and two-sided Shampoo on a small language model: loss against steps and against time.

    python -m benchmarks.papers.shampoo_language_model [--steps 300] [--seeds 3] [--out FILE.json]

A decoder trains on the text of the demo (the standard library of this Python), every method on the same batches, with
the same warm-up and cosine. Of each method all learning rates run with the first seed; the best one by validation loss
runs with the others. Matrices of the layers are stepped by the method; embedding and vectors by AdamW with the same
learning rate, as a step of each of these methods has a root mean square of about 0.2 times its rate (Muon: adjust_lr_fn
"match_rms_adamw"). Two-sided Shampoo runs with exponents 1/4, and with 1/2 on each side. Seconds are those of a step,
forward and backward included, validation not: process CPU time on one thread, and wall time. A sweep of this size says
nothing of large models.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import nn

from effkern.data import BatchOrder, PackedDataset, build_dataset, val_batches
from effkern.models import Decoder, DecoderConfig, count_parameters
from effkern.ops.distill import linear_distill_loss
from effkern.train.config import OptimizerConfig, ShampooConfig
from effkern.train.evaluation import evaluate
from effkern.train.optimizer import build_optimizer, set_rate, split_decay
from effkern.train.schedules import learning_rate

VOCAB, LENGTH, ROWS = 1024, 64, 8
METHODS = ("adamw", "muon", "one-sided", "two-sided", "two-sided 1/2")
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)


def decoder(a: argparse.Namespace, seed: int) -> Decoder:
    config = DecoderConfig(
        vocab_size=VOCAB, hidden_size=a.width, num_layers=a.layers, num_heads=4, num_kv_heads=4, mlp_size=3 * a.width,
        max_seq_len=LENGTH,
    )  # fmt: skip
    return Decoder(config, seed=seed)


def optimizers(method: str, model: nn.Module, config: OptimizerConfig, beta2: float) -> list[torch.optim.Optimizer]:
    if method == "muon":
        decayed, plain = split_decay(model)
        muon = torch.optim.Muon(decayed, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(plain, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=0.0, fused=True)
        return [muon, adamw]
    if method == "adamw":
        return [build_optimizer(model, config)]
    chosen = ShampooConfig(
        side="auto" if method == "one-sided" else "both",
        exponent=0.5 if method.endswith("1/2") else 0.0,
        beta2=beta2,
    )
    return [build_optimizer(model, replace(config, name="shampoo", shampoo=chosen))]


def train(method: str, lr: float, seed: int, data: PackedDataset, a: argparse.Namespace) -> dict[str, Any]:
    """One run; the curve holds (step, validation loss, CPU seconds, wall seconds)."""
    config = OptimizerConfig(lr=lr, warmup_steps=a.steps // 10)
    model = decoder(a, seed)
    order = BatchOrder(data, seq_len=LENGTH, batch_size=ROWS, seed=seed)
    steppers = optimizers(method, model, config, a.beta2)
    curve, cpu, wall = [], 0.0, 0.0
    for step in range(a.steps):
        c, w = time.process_time(), time.perf_counter()
        tokens = torch.from_numpy(order.batch(step))
        for optimizer in steppers:
            optimizer.zero_grad(set_to_none=True)
        hidden = model(tokens[:, :-1]).flatten(0, 1)
        loss = linear_distill_loss(
            hidden, model.head_weight, tokens[:, 1:].flatten(), vocab_valid=model.vocab_valid
        ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for optimizer in steppers:
            set_rate(optimizer, learning_rate(config, a.steps, step))
            optimizer.step()
        cpu, wall = cpu + time.process_time() - c, wall + time.perf_counter() - w
        if (step + 1) % a.every == 0 or step + 1 == a.steps:
            batches = val_batches(data, LENGTH, 4 * ROWS, a.eval_tokens)
            value = evaluate(model, batches, data.bytes_per_token("val"), torch.float32).loss
            curve.append([step + 1, round(value, 5), round(cpu, 3), round(wall, 3)])
    return {"method": method, "lr": lr, "seed": seed, "loss": curve[-1][1], "cpu_s": cpu, "curve": curve}


def measure(data: PackedDataset, a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for method in a.methods:
        first = []
        for lr in a.rates:
            first.append(train(method, lr, 0, data, a))
            yield first[-1]
        best = min(first, key=lambda r: r["loss"] if r["loss"] == r["loss"] else float("inf"))["lr"]
        for seed in range(1, a.seeds):
            yield train(method, best, seed, data, a)


def reached(curve: list[list[float]], loss: float) -> list[float] | None:
    """The first point of a curve that is at `loss` or below."""
    return next((point for point in curve if point[1] <= loss), None)


def table(records: list[dict[str, Any]]) -> str:
    """Of the best learning rate of each method; steps and seconds to AdamW's final loss where every seed reaches it."""
    head = "| method | best lr | validation loss | ms a step, CPU | steps to AdamW's loss | CPU s to it |"
    lines = [head, "|---" * 6 + "|"]
    chosen: dict[str, list[dict[str, Any]]] = {}
    for method in dict.fromkeys(r["method"] for r in records):
        rows = [r for r in records if r["method"] == method]
        best = min((r for r in rows if r["seed"] == 0), key=lambda r: r["loss"])["lr"]
        chosen[method] = [r for r in rows if r["lr"] == best]
    base = {r["seed"]: r["loss"] for r in chosen.get("adamw", [])}
    for method, rows in chosen.items():
        losses = [r["loss"] for r in rows]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        points = [p for r in rows if r["seed"] in base and (p := reached(r["curve"], base[r["seed"]]))]
        to = (
            f"{statistics.mean(p[0] for p in points):.0f} | {statistics.mean(p[2] for p in points):.1f}"
            if len(points) == len(rows)
            else "not reached by all | "
        )
        step = statistics.mean(r["cpu_s"] / r["curve"][-1][0] for r in rows)
        lines.append(
            f"| {method} | {rows[0]['lr']:g} | {statistics.mean(losses):.4f} +- {spread:.4f} | {1e3 * step:.1f} "
            f"| {to} |"
        )
    lines += ["", "Validation loss with the first seed:", ""]
    rates = sorted({r["lr"] for r in records if r["seed"] == 0})
    lines += ["| method | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for method in chosen:
        found = {r["lr"]: r["loss"] for r in records if r["method"] == method and r["seed"] == 0}
        lines.append(f"| {method} | " + " | ".join(f"{found[lr]:.4f}" if lr in found else "" for lr in rates) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--beta2", type=float, default=0.8, help="of Shampoo's factors")
    parser.add_argument("--every", type=int, default=30, help="steps between two validations")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/shampoo_language_model"), help="the packed corpus")
    parser.add_argument("--out", type=Path, help="write records and machine as JSON")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    warnings.filterwarnings("ignore", "Shampoo: exponents sum to 1")
    try:
        data = PackedDataset(a.work / "data")
    except FileNotFoundError:
        data = build_dataset(a.work / "data", ["stdlib"], vocab_size=VOCAB, max_bytes=8_000_000)
    print(json.dumps({"parameters": count_parameters(decoder(a, 0).config), **runner.machine()}))
    records = []
    for record in measure(data, a):
        records.append(record)
        print(json.dumps({k: v for k, v in record.items() if k != "curve"}), flush=True)
    print(table(records))
    if a.out:
        case = {k: v for k, v in vars(a).items() if k not in ("work", "out")}
        case |= {"vocabulary": VOCAB, "length": LENGTH, "rows": ROWS, **runner.machine()}
        a.out.write_text(json.dumps({**case, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
