"""One LoRA-RITE step of many pairs beside AdamW on the same parameters and a copy of the bytes that it must move.

    python -m benchmarks.ops.lora_rite                        64 pairs of rank 16 and 16 of rank 64, 1024 x 1024
    python -m benchmarks.ops.lora_rite --stages               the four stages alone, in process CPU time
    python -m benchmarks.ops.lora_rite --device cuda --pairs 500 --rows 4096 --ranks 16

Parameters, gradients and moments are float32; half of the factors are [rows, r], half [r, rows]. `copy` moves as many
bytes as the floor: five words per element (X, M and G read, X and M written). Its ratio to LoRA-RITE is the share of
the bandwidth limit. The gradients change from round to round, as in training.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness  # isort: skip

import torch
from torch import Tensor

from benchmarks.case import Axis, Case, Op, Prepared, Run, Scaling, Work, hold
from effkern.ops.lora_rite import RiteGroup, RiteOptions, lora_rite_rebuild_, lora_rite_step_, new_group, stages
from effkern.ops.lora_rite import reference as paper
from effkern.ops.lora_rite.terms import terms_of

# G is needed twice, by its Gram matrix and by the update; but nothing of one pair waits for another, so that taken pair
# by pair G (r x rows, tens to hundreds of KiB) is in the cache the second time. An implementation that goes over all
# pairs before the update, as ours does, reads six.
FLOOR_WORDS = 5
VARIANTS = ("LoRA-RITE", "AdamW foreach", "AdamW fused", "copy")
# Of rows x r x r: the gradient times a basis (2) and half of its Gram matrix (1), M carry, G take and M apply (6), X in
# its basis before and after (4), half of its Gram matrix and their product (3). What is r x r is not counted.
FLOPS = 16
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


def check(case: Case) -> None:
    """Three steps of one small pair against the reference in float64."""
    rank = case["rank"]
    group, grads = make(1, 3 * rank, rank, case["device"])
    options = RiteOptions()
    pair = paper.new_pair(group.factors[0].T.double(), group.factors[1].double())
    for step in range(3):
        given = (grads[step][0].T.double(), grads[step][1].double())
        (pair,) = paper.rite_step([pair], [given], [(1e-3, 1e-3)], [options])
        lora_rite_step_([group], [grads[step]], [1e-3], [options])
    product = group.factors[0].T.double() @ group.factors[1].double().T
    hold([(product, pair.A @ pair.B.T)], 1e-5)


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    group, grads = make(case["pairs"], case["rows"], case["rank"], case["device"])
    runs = variants(group, grads)
    parameters = sum(x.nbytes for x in group.factors)
    extra = {"LoRA-RITE": {"state_over_parameters": group.state_bytes() / parameters}}
    # Gradients change anyhow, so that factors and moments are what a call would find again.
    return Prepared({name: runs[name] for name in names}, held=2 * parameters, extra=extra)


def variants(group: RiteGroup, grads: list[list[Tensor]]) -> dict[str, Run]:
    options, count = RiteOptions(), len(group.factors)
    rates = torch.full((count,), 1e-4, dtype=torch.float64, device=group.whiten.device)
    rounds = dict.fromkeys(VARIANTS, 0)
    # A copy reads and writes each.
    moved = FLOOR_WORDS * sum(x.numel() for x in group.factors) // 2
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


def elements(case: Case) -> int:
    return 2 * case["pairs"] * case["rows"] * case["rank"]


def work(case: Case) -> Work:
    return Work(4 * FLOOR_WORDS * elements(case), FLOPS * elements(case) * case["rank"])


def why(case: Case) -> list[str]:
    group, _ = make(1, 2 * case["rank"], case["rank"], case["device"])
    tall = stages.choose("auto", group.factors[0], case["rank"])
    small = "compiled" if stages.small_compiled("auto", group.factors[0], case["rank"]) else "torch's, in float64"
    return [f"passes over the rows: {tall}; what is r x r: {small}"]


def cases_of(a: argparse.Namespace) -> Iterator[Case]:
    """Ranks and pairs go together."""
    for i, rank in enumerate(a.rank):
        for rows in a.rows:
            yield {"pairs": a.pairs[i % len(a.pairs)], "rows": rows, "rank": rank, "device": a.device}


def print_stages(a: argparse.Namespace) -> bool:
    for case in cases_of(a) if a.stages else ():
        check(case)
        times = stage_times(*make(case["pairs"], case["rows"], case["rank"], case["device"]))
        print(json.dumps({**case, "stages_cpu_ms": {k: round(v, 2) for k, v in times.items()}}), flush=True)
    return a.stages


OP = Op(
    name="lora_rite",
    doc=__doc__,
    axes=(
        Axis("pairs", "--pairs", (64, 16), help="one per rank, or one for all"),
        Axis("rows", "--rows", (1024,)),
        Axis("rank", "--ranks", (16, 64)),
    ),
    variants=VARIANTS,
    check=check,
    prepare=prepare,
    work=work,
    works=lambda case: {"copy": Work(work(case).bytes), "AdamW foreach": None, "AdamW fused": None},
    floor={"copy": 1.0},
    ours="LoRA-RITE",
    registry=("lora_rite",),
    why=why,
    options=lambda p: p.add_argument("--stages", action="store_true", help="time the stages instead"),
    instead=print_stages,
    cases=cases_of,
    rotates=True,
    rounds=21,
    scaling=(
        Scaling("rows", (512, 1024, 2048, 4096, 8192), {"pairs": 4, "rank": 16}, "1: every row costs the same"),
        Scaling("rank", (4, 8, 16, 32, 64), {"pairs": 2, "rows": 512},
                "from 1 (memory) over 2 (products with rows) towards 3 (r x r)"),
    ),
    no_huge="factors of 2^31 elements would be those of adapters for a model of 10^15 parameters",
)  # fmt: skip

if __name__ == "__main__":
    harness.main(OP)
