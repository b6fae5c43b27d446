"""Small decoders in k x L notation trained on generated tasks: what the experiments of looped models share."""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from effkern.models import Decoder, DecoderConfig
from effkern.models.loop_config import LoopConfig
from effkern.models.stages import parse_stages

# Tokens and labels [B, T]; -100 is no label.
Batch = tuple[Tensor, Tensor]


def decoder(stages: str, vocab: int, length: int, width: int, heads: int, seed: int) -> Decoder:
    """`stages` as "6x1" or "1x6"; the FFN is of 3 hidden sizes, gated."""
    parsed = parse_stages(stages)
    looped = any(stage.looped for stage in parsed)
    config = DecoderConfig(
        vocab_size=vocab, hidden_size=width, num_layers=sum(stage.layers for stage in parsed), num_heads=heads,
        num_kv_heads=heads, mlp_size=3 * width, max_seq_len=length, tie_head=False, init_std=width**-0.5,
        stack="looped" if looped else "plain",
        loop=LoopConfig(stages=stages, mode="autograd") if looped else LoopConfig(),
    )  # fmt: skip
    return Decoder(config, seed=seed)


def rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def loss_and_hits(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean loss of the labels, and whether each label's logit is the largest, [B, T] (true where there is no label)."""
    tokens, labels = batch
    logits = model.logits(model(tokens))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss, (logits.argmax(2) == labels) | (labels == -100)


def train(
    model: Decoder,
    batches: Callable[[int], Batch],
    steps: int,
    lr: float,
    *,
    penalty: Callable[[], Tensor] | None = None,
    watch: Callable[[int, float], None] | None = None,
    report: int = 0,
) -> list[float]:
    """AdamW (0.9, 0.98), clipped at norm 1; returns the losses. `watch` gets each step's share of right labels."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    losses, start = [], time.perf_counter()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, steps, max(1, steps // 20))
        batch = batches(step)
        loss, hits = loss_and_hits(model, batch)
        share = (hits & (batch[1] != -100)).sum() / (batch[1] != -100).sum()
        total = loss if penalty is None else loss + penalty()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if watch is not None:
            watch(step, share.item())
        if report and (step + 1) % report == 0:
            mean = statistics.mean(losses[-report:])
            print(
                f"  step {step + 1}: loss {mean:.3f}, right {share:.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return losses


@torch.no_grad()
def accuracy(model: Decoder, batches: Sequence[Batch]) -> float:
    """Share of rows whose labels are all right."""
    model.eval()
    return statistics.mean(loss_and_hits(model, batch)[1].all(1).double().mean().item() for batch in batches)


def parameters(model: Decoder) -> int:
    return sum(p.numel() for p in model.parameters())


def common_options(parser: argparse.ArgumentParser, models: str, steps: int, seeds: int, lr: float) -> None:
    if models:
        parser.add_argument("--models", nargs="+", default=models.split(), help="layers x loops, as 6x1 or 1x6")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=int, default=0, help="print the loss every so many steps")
    parser.add_argument("--out", type=Path, help="write records and machine as JSON; records that are there are kept")


def spread(x: Sequence[float]) -> str:
    return f"{statistics.mean(x):.3f} +- {statistics.stdev(x) if len(x) > 1 else 0.0:.3f}"


# Options that do not change what a record means.
FREE_OPTIONS = ("out", "report", "models", "weights", "seeds", "first_seed", "threads")


def settings(a: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(a).items() if k not in FREE_OPTIONS}


def write(a: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """After each run, so that one that is cut short is not lost."""
    if a.out is not None:
        a.out.write_text(json.dumps({**settings(a), **runner.machine(), "records": records}, indent=1) + "\n")


def earlier(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of a file that an interrupted command left.

    Raises:
        SystemExit: they were made with other options.
    """
    if a.out is None or not a.out.exists():
        return []
    found = json.loads(a.out.read_text())
    other = {k: found.get(k) for k, v in settings(a).items() if found.get(k) != v}
    if other:
        raise SystemExit(f"{a.out} was made with other options: {other}; choose another --out")
    return found["records"]
