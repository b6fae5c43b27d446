"""One LoRA-RITE step of many pairs beside AdamW on the same parameters and a copy of the bytes that it must move.

    python -m benchmarks.ops.lora_rite                        64 pairs of rank 16 and 16 of rank 64, 1024 x 1024
    python -m benchmarks.ops.lora_rite --stages               and the four stages, in process CPU time
    python -m benchmarks.ops.lora_rite --device cuda --pairs 500 --rows 4096 --ranks 16

Parameters, gradients and moments are float32; half of the factors are [rows, r], half [r, rows]. `copy` moves as many
bytes as the floor: six words per element (X, M and G read, G once more by the norm, X and M written). Its ratio to
LoRA-RITE is the share of the bandwidth limit. The gradients change from round to round, as in training.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from effkern.ops.lora_rite import RiteGroup, RiteOptions, lora_rite_rebuild_, lora_rite_step_, new_group, stages
from effkern.ops.lora_rite import reference as paper
from effkern.ops.lora_rite.terms import terms_of

FLOOR_WORDS = 6
VARIANTS = ("LoRA-RITE", "AdamW foreach", "AdamW fused", "copy")
CASE = ("pairs", "rows", "rank", "device")
NUM_GRADS = 4
"""Sets of gradients that take turns."""


def make(pairs: int, rows: int, rank: int, device: str) -> tuple[RiteGroup, list[list[Tensor]]]:
    torch.manual_seed(0)
    factors = []
    for _ in range(pairs):
        factors += [torch.randn(rank, rows) / math.sqrt(rows), torch.randn(rows, rank) * 0.02]
    group = new_group([x.to(device) for x in factors], [True, False] * pairs)
    lora_rite_rebuild_(group, RiteOptions())
    grads = [[1e-3 * torch.randn_like(x) for x in group.factors] for _ in range(NUM_GRADS)]
    return group, grads


def check(rank: int, device: str) -> None:
    """No number on a wrong result: three steps of one small pair against the reference in float64."""
    group, grads = make(1, 3 * rank, rank, device)
    options = RiteOptions()
    pair = paper.new_pair(group.factors[0].T.double(), group.factors[1].double())
    for step in range(3):
        given = (grads[step][0].T.double(), grads[step][1].double())
        (pair,) = paper.rite_step([pair], [given], [(1e-3, 1e-3)], [options])
        lora_rite_step_([group], [grads[step]], [1e-3], [options])
    truth = pair.A @ pair.B.T
    error = (group.factors[0].T.double() @ group.factors[1].double().T - truth).norm() / truth.norm()
    if not error < 1e-5:
        raise SystemExit(f"wrong result: error {error:.1e} at rank {rank}; nothing is timed")


def variants(group: RiteGroup, grads: list[list[Tensor]]) -> dict[str, Callable[[], object]]:
    options, count = RiteOptions(), len(group.factors)
    rates = torch.full((count,), 1e-4, dtype=torch.float64, device=group.whiten.device)
    rounds = dict.fromkeys(VARIANTS, 0)
    moved = FLOOR_WORDS // 2 * sum(x.numel() for x in group.factors)
    source = torch.zeros(moved, device=group.whiten.device)
    target = torch.zeros_like(source)
    copies = {name: [x.clone().requires_grad_() for x in group.factors] for name in VARIANTS[1:3]}
    optimizers = {
        name: torch.optim.AdamW(copies[name], lr=1e-4, foreach=name.endswith("foreach"), fused=name.endswith("fused"))
        for name in copies
    }

    def turn(name: str) -> list[Tensor]:
        rounds[name] += 1
        return grads[rounds[name] % NUM_GRADS]

    def rite() -> object:
        return lora_rite_step_([group], [turn("LoRA-RITE")], [rates], [options])

    def adamw(name: str) -> Callable[[], object]:
        def run() -> object:
            for p, g in zip(copies[name], turn(name)):
                p.grad = g
            return optimizers[name].step()

        return run

    return {"LoRA-RITE": rite, **{name: adamw(name) for name in copies}, "copy": lambda: target.copy_(source)}


def stage_times(group: RiteGroup, grads: list[list[Tensor]], rounds: int = 9) -> dict[str, float]:
    """Median process CPU milliseconds of each stage, and of one fp64 rebuild."""
    options, terms = RiteOptions(), terms_of(RiteOptions())
    rates = torch.full((len(group.factors),), 1e-4, dtype=torch.float64, device=group.whiten.device)
    found: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        result = run(*arguments)
        found.setdefault(name, []).append(1e3 * (time.process_time() - start))
        return result

    for i in range(rounds):
        given = grads[i % NUM_GRADS]
        other = stages.plain.other(group.whiten)
        h = timed("gram", stages.gram, given, group.wide, other)
        traces = stages.traces(group, h, terms.skip_rms)
        update = timed("precondition", stages.precondition_, group, h, traces, rates, None, terms, "auto")
        lists = (group.factors, group.moments, given, group.wide)
        products = timed("update", stages.update_, *lists, update, group.whiten, group.exact)
        timed("rebase", stages.rebase_, group, products, update.gate, terms.tolerance)
    timed("rebuild", lora_rite_rebuild_, group, options)
    return {name: statistics.median(times) for name, times in found.items()}


HEAD = "| pairs | rows | r | LoRA-RITE ms | spread | cpu ms | x AdamW foreach | cpu | x AdamW fused | x copy | state |"


def markdown(case: dict[str, Any], t: dict[str, runner.Timing], state: float) -> str:
    ours = t["LoRA-RITE"]
    cells = [
        *(str(case[name]) for name in CASE[:3]), f"{ours.wall * 1e3:.1f}",
        f"{ours.wall_low * 1e3:.1f}-{ours.wall_high * 1e3:.1f}", f"{ours.cpu * 1e3:.1f}",
        f"{ours.wall / t['AdamW foreach'].wall:.2f}", f"{ours.cpu / t['AdamW foreach'].cpu:.2f}",
        f"{ours.wall / t['AdamW fused'].wall:.2f}", f"{ours.wall / t['copy'].wall:.2f}", f"{state:.3f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 16], help="one per rank, or one for all")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages", action="store_true", help="also time the four stages")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if not a.json:
        print(json.dumps(runner.machine()))
        print(HEAD, "|" + "---|" * HEAD.count(" |"), sep="\n", flush=True)
    for i, rank in enumerate(a.ranks):
        case = dict(zip(CASE, (a.pairs[i % len(a.pairs)], a.rows, rank, a.device)))
        check(rank, a.device)
        group, grads = make(case["pairs"], a.rows, rank, a.device)
        timings = runner.interleave(variants(group, grads), a.rounds)
        state = group.state_bytes() / sum(x.nbytes for x in group.factors)
        extra: dict[str, dict] = {"LoRA-RITE": {"state_over_parameters": state}}
        if a.stages:
            extra["LoRA-RITE"]["stages_cpu_ms"] = stage_times(group, grads)
        if a.json:
            print("\n".join(runner.result_lines("lora_rite", case, timings, extra)), flush=True)
        else:
            print(markdown(case, timings, state), flush=True)
            if a.stages:
                print(json.dumps({k: round(v, 2) for k, v in extra["LoRA-RITE"]["stages_cpu_ms"].items()}), flush=True)


if __name__ == "__main__":
    main()
