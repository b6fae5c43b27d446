"""Fine-tuning by LoRA on a problem with a known answer: every optimizer at its best rate, from equivalent starts.

    python -m benchmarks.papers.lora_finetune [--steps N] [--seeds N] [--json [FILE]]

A frozen network of two tanh layers, and targets of the same network with low-rank changes of all weights; adapters of
that rank are fitted to noisy targets in small batches. Printed: the loss on fresh data (mean over seeds) at the best
learning rate of each optimizer's grid, chosen at the usual start, and with that same rate from starts at which A is 30
times as large and as small. B = 0, so that all three have the same product: an invariant method cannot tell them apart.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor, nn

from effkern.nn.lora import inject_lora, lora_layers
from effkern.optim import LoRAMuon, LoRARite, ScaledAdam

SIZE, RANK, BATCH = 48, 4, 32
SCALES = (1.0, 30.0, 1 / 30)
GRID = tuple(10.0 ** (k / 2) for k in range(-7, 0))
Made = Callable[[nn.Module, float], torch.optim.Optimizer]


def factors(model: nn.Module, side: int) -> list[Tensor]:
    return [layer.factors()[side] for layer in lora_layers(model).values()]


def adamw(model: nn.Module, lr: float, ratio: float = 1.0) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": factors(model, 0)}, {"params": factors(model, 1), "lr": ratio * lr}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)


def lora_fa(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    for A in factors(model, 0):
        A.requires_grad_(False)
    return torch.optim.AdamW(factors(model, 1), lr=lr, weight_decay=0.0)


OPTIMIZERS: dict[str, Made] = {
    "AdamW": adamw,
    "AdamW, LoRA+ (16)": lambda model, lr: adamw(model, lr, 16.0),
    "AdamW, LoRA-FA": lora_fa,
    "ScaledAdam": lambda model, lr: ScaledAdam(model, lr=lr),
    "LoRA-Muon": lambda model, lr: LoRAMuon(model, lr=lr),
    "LoRA-RITE": lambda model, lr: LoRARite(model, lr=lr),
    "LoRA-RITE, rho": lambda model, lr: LoRARite(model, lr=lr, escaped_mass=True),
}


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(m for _ in range(2) for m in (nn.Linear(SIZE, SIZE), nn.Tanh())), nn.Linear(SIZE, SIZE))


def fit(make: Made, lr: float, seed: int, steps: int, scale: float) -> float:
    """Loss on fresh data after `steps`, inf where it was lost on the way."""
    truth, model = network(seed), network(seed)
    with torch.no_grad():
        for layer in (truth[0], truth[2], truth[4]):
            assert isinstance(layer, nn.Linear)
            change = torch.randn(SIZE, RANK) @ torch.randn(RANK, SIZE)
            layer.weight.add_(change, alpha=0.5 / SIZE)
    inject_lora(model, ["0", "2", "4"], rank=RANK, alpha=float(RANK), seed=seed)
    for A in factors(model, 0):
        A.data.mul_(scale)
    optimizer = make(model, lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group.setdefault("first", group["lr"])
            group["lr"] = group["first"] * (1 - step / steps)
        x = torch.randn(BATCH, SIZE)
        with torch.no_grad():
            y = truth(x) + 0.1 * torch.randn(BATCH, SIZE)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        x = torch.randn(2048, SIZE)
        loss = (model(x) - truth(x)).square().mean().item()
    return loss if loss == loss else float("inf")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", nargs="?", const="benchmarks/results/lora_finetune.json", default="")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, steps = range(options.seeds), options.steps
    results: dict[str, Any] = {}
    before = statistics.mean(fit(adamw, 0.0, seed, 1, 1.0) for seed in seeds)
    print(f"loss before {before:.5f}; {steps} steps, {len(seeds)} seeds; rate chosen at A x 1")
    print("| optimizer | rate | " + " | ".join(f"A x {scale:.2g}" for scale in SCALES) + " |")
    print("|" + " --- |" * (2 + len(SCALES)))
    for name, make in OPTIMIZERS.items():
        grid = {lr: statistics.mean(fit(make, lr, seed, steps, 1.0) for seed in seeds) for lr in GRID}
        best = min(grid, key=lambda lr: grid[lr])
        found = {1.0: grid[best]}
        for scale in SCALES[1:]:
            found[scale] = statistics.mean(fit(make, best, seed, steps, scale) for seed in seeds)
        results[name] = {
            "rate": best,
            "edge_of_grid": best in (GRID[0], GRID[-1]),
            "loss": {f"{scale:.4g}": found[scale] for scale in SCALES},
            "grid": {f"{lr:.3g}": loss for lr, loss in grid.items()},
        }
        edge = " (edge)" if results[name]["edge_of_grid"] else ""
        print(f"| {name} | {best:.2g}{edge} | " + " | ".join(f"{found[s]:.5f}" for s in SCALES) + " |", flush=True)
    if options.json:
        written = {"before": before, "steps": steps, "seeds": len(seeds), "optimizers": results, **runner.machine()}
        Path(options.json).write_text(json.dumps(written, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
