"""A whole step of LoRARite: time and state beside AdamW and the packaged port, and what is left of the invariance.

    python -m benchmarks.lora_rite_step [--parts time state invariance] [--rounds N] [--threads N] [--json [FILE]]
        [--port FOLDER]

time and state: P pairs of 1024 x 1024, float32, all variants on the same gradients, in turn. invariance: two pairs of
one product, A B^T and (A Q)(B Q^-T)^T, take the same gradients of the product; printed is the relative difference of
what 1 and 20 steps do to it. `floor`: the float64 reference on factors and gradients that are rounded to float32 before
every step, which is the best that any float32 optimizer can be given. `ours / floor` is the ratio for float32.

--port: a folder with the package pytorch-optimizer (`pip install --no-deps --target FOLDER pytorch-optimizer`), whose
LoRARite is a port of the published code.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor, nn

from effkern.ops.lora_rite.reference import Pair, RiteOptions, new_pair, rite_step
from effkern.optim import LoraPair, LoRARite

Optimizers = dict[str, Callable[[list[nn.Parameter]], Any]]
CASES = ((64, 1024, 16), (16, 1024, 64))
CHANGES = ("rotation", "scale 100", "condition 1e3", "condition 1e5", "condition 1e6")
STEPS = (1, 20)
RATE = 1e-3


def port_of(folder: str) -> Any:
    """LoRARite of pytorch-optimizer, from a folder of its own."""
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("pytorch_optimizer.optimizer.lora_rite").LoRARite
    finally:
        sys.path.remove(folder)


def pairs(flat: list[nn.Parameter]) -> list[LoraPair]:
    return [LoraPair(f"pair {i}", flat[2 * i], flat[2 * i + 1], 0, 1) for i in range(len(flat) // 2)]


def variants(port: Any) -> Optimizers:
    found: Optimizers = {
        "AdamW foreach": lambda flat: torch.optim.AdamW(flat, lr=RATE, foreach=True),
        "AdamW fused": lambda flat: torch.optim.AdamW(flat, lr=RATE, fused=True),
        "LoRARite": lambda flat: LoRARite(pairs(flat), lr=RATE),
        "LoRARite rho": lambda flat: LoRARite(pairs(flat), lr=RATE, escaped_mass=True),
        "LoRARite fused=False": lambda flat: LoRARite(pairs(flat), lr=RATE, fused=False),
    }
    if port is not None:
        found["port"] = lambda flat: port(flat, lr=RATE)
    return found


def problem(count: int, size: int, rank: int) -> list[nn.Parameter]:
    torch.manual_seed(0)
    flat = []
    for _ in range(count):
        A = nn.Parameter(torch.randn(rank, size) / size**0.5)
        B = nn.Parameter(torch.randn(size, rank) * 0.01)
        A.grad, B.grad = torch.randn_like(A) * 1e-4, torch.randn_like(B) * 1e-4
        flat += [A, B]
    return flat


def state_bytes(optimizer: Any) -> int:
    """Tensors of the state, each memory once."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)

    visit(dict(enumerate(optimizer.state.values())))
    return sum(seen.values())


def time_and_state(port: Any, rounds: int, timed: bool) -> list[dict[str, Any]]:
    lines = []
    for count, size, rank in CASES:
        runs, extra = {}, {}
        for name, make in variants(port).items():
            flat = problem(count, size, rank)
            optimizer = make(flat)
            optimizer.step()
            share = state_bytes(optimizer) / sum(4 * p.numel() for p in flat)
            extra[name] = {"state_x_parameters": round(share, 4)}
            runs[name] = optimizer.step
        case = {"pairs": count, "rows": size, "rank": rank}
        if not timed:
            lines += [{"benchmark": "lora_rite_state", "case": case, "variant": n, **e} for n, e in extra.items()]
            print(f"state, P={count} {size}x{size} r={rank}: " + ", ".join(
                f"{name} {e['state_x_parameters']:.3f}" for name, e in extra.items()))  # fmt: skip
            continue
        timings = runner.interleave(runs, rounds)
        print(f"step, P={count} {size}x{size} r={rank}, {torch.get_num_threads()} threads")
        print(runner.table(timings, "AdamW foreach", {}))
        lines += [json.loads(line) for line in runner.result_lines("lora_rite_step", case, timings, extra)]
    return lines


# Invariance ---------------------------------------------------------------------------------------------------------


def change(name: str, rank: int) -> Tensor:
    """Q of a case, float64."""
    left, right = (torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q for _ in range(2))
    if name == "rotation":
        return left
    if name.startswith("scale"):
        return float(name.split()[1]) * torch.eye(rank, dtype=torch.float64)
    values = torch.logspace(0, torch.log10(torch.tensor(float(name.split()[1]))).item(), rank, dtype=torch.float64)
    return left * values @ right.T


class Descent:
    """The loss: half the squared distance of Z to a target, with noise; its gradients by step, from tall A and B."""

    def __init__(self, rows: int, rank: int) -> None:
        torch.manual_seed(1)
        self.A = torch.randn(rows, rank, dtype=torch.float64) / rows**0.5
        self.B = torch.randn(rows, rank, dtype=torch.float64) * 0.1
        self.target = torch.randn(rows, rows, dtype=torch.float64) * 0.1
        self.noise = [torch.randn(rows, rows, dtype=torch.float64) * 0.1 for _ in range(max(STEPS))]

    def gradients(self, A: Tensor, B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        A, B = A.double(), B.double()
        G = (A @ B.T - self.target + self.noise[step]) / self.target.numel()
        return G @ B, G.T @ A


def by_reference(path: Descent, A: Tensor, B: Tensor, rounded: bool) -> list[Tensor]:
    """What 1 and 20 steps of the float64 reference do to Z; `rounded`: on float32 factors and gradients."""

    def kept(x: Tensor) -> Tensor:
        return x.float().double() if rounded else x

    pair = new_pair(kept(A), kept(B))
    start, found = pair.A @ pair.B.T, []
    for step in range(max(STEPS)):
        grads = tuple(kept(g) for g in path.gradients(pair.A, pair.B, step))
        (pair,) = rite_step([pair], [(grads[0], grads[1])], [(RATE, RATE)], [RiteOptions()])
        pair = Pair(kept(pair.A), kept(pair.B), *pair[2:])
        if step + 1 in STEPS:
            found.append(pair.A @ pair.B.T - start)
    return found


def by_optimizer(
    path: Descent, A: Tensor, B: Tensor, make: Callable[[list[nn.Parameter]], Any], dtype: torch.dtype
) -> list[Tensor]:
    # Copies: a step writes them.
    flat = [nn.Parameter(x.to(dtype).clone(memory_format=torch.contiguous_format)) for x in (A.T, B)]
    optimizer = make(flat)

    def product() -> Tensor:
        return flat[0].detach().double().T @ flat[1].detach().double().T

    start, found = product(), []
    for step in range(max(STEPS)):
        grad_A, grad_B = path.gradients(flat[0].detach().T, flat[1].detach(), step)
        flat[0].grad, flat[1].grad = grad_A.T.to(dtype).contiguous(), grad_B.to(dtype)
        optimizer.step()
        if step + 1 in STEPS:
            found.append(product() - start)
    return found


def invariance(port: Any, rows: int = 256, rank: int = 16) -> list[dict[str, Any]]:
    path = Descent(rows, rank)
    single = torch.float32
    ways: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
        "AdamW": lambda A, B: by_optimizer(path, A, B, lambda flat: torch.optim.AdamW(flat, lr=RATE), single),
        "LoRARite": lambda A, B: by_optimizer(path, A, B, lambda flat: LoRARite(pairs(flat), lr=RATE), single),
        "LoRARite float64": lambda A, B: by_optimizer(
            path, A, B, lambda flat: LoRARite(pairs(flat), lr=RATE), torch.float64
        ),
        "floor": lambda A, B: by_reference(path, A, B, rounded=True),
        "reference float64": lambda A, B: by_reference(path, A, B, rounded=False),
    }
    if port is not None:
        ways["port"] = lambda A, B: by_optimizer(path, A, B, lambda flat: port(flat, lr=RATE), single)
    plain = {name: way(path.A, path.B) for name, way in ways.items()}
    lines = []
    head = [f"{name} {steps}" for name in ways for steps in STEPS]
    print(f"invariance, {rows} rows, rank {rank}: relative difference of what 1 and 20 steps do to A B^T")
    print("| change | " + " | ".join([*head, *(f"ours / floor {s}" for s in STEPS)]) + " |")
    print("|" + " --- |" * (len(head) + 1 + len(STEPS)))
    for name in CHANGES:
        torch.manual_seed(2)
        Q = change(name, rank)
        A, B = path.A @ Q, torch.linalg.solve(Q, path.B.T).T
        errors = {
            way: [((x - y).norm() / y.norm()).item() for x, y in zip(run(A, B), plain[way])]
            for way, run in ways.items()
        }
        ratio = [ours / floor for ours, floor in zip(errors["LoRARite"], errors["floor"])]
        cells = [f"{e:.1e}" for way in ways for e in errors[way]] + [f"{r:.2f}" for r in ratio]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        case = {"rows": rows, "rank": rank, "change": name, "steps": list(STEPS)}
        lines.append({"benchmark": "lora_rite_invariance", "case": case, "errors": errors, "ours_over_floor": ratio,
                      **runner.machine()})  # fmt: skip
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("time", "state", "invariance"), default=["time", "invariance"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", default="")
    parser.add_argument("--json", nargs="?", const="benchmarks/results/lora_rite_step.jsonl", default="")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    runner.keep_memory()
    port = port_of(options.port) if options.port else None
    lines = []
    if "time" in options.parts:
        lines += time_and_state(port, options.rounds, timed=True)
    if "state" in options.parts or "time" in options.parts:
        lines += time_and_state(port, 0, timed=False)
    if "invariance" in options.parts:
        lines += invariance(port)
    if options.json:
        Path(options.json).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
