"""loop_similarity beside eager, torch.compile and a copy of the bytes that it must move.

    python -m benchmarks.ops.loop_similarity                         D = 768 and 2048, float32 and bfloat16
    python -m benchmarks.ops.loop_similarity --dims 768 --layers 12 --block 4 --dtypes float32

The seven matrices of each layer of a decoder (4 of D x D, 3 of D x F, F = 8/3 D). Moves are of all parameters: forward
reads them once (1), backward reads them and writes their gradients (3 in both). `eager` is cosine_similarity of each
pair, which reads all but the outer blocks' tensors twice; `copy` moves as many bytes by Tensor.copy_.
"""

import argparse
import json
from collections.abc import Callable
from itertools import product
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.laurel import repeated
from effkern import loop_similarity

PASSES = ("forward", "both")
MOVES = {"forward": 1, "both": 3}
CASE = ("dim", "layers", "block", "dtype", "pass", "device")
Groups = list[list[Tensor]]


def make(dim: int, layers: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Groups:
    torch.manual_seed(0)
    wide = int(scale * dim * 8 / 3) // 64 * 64
    shapes = [(int(scale * dim), dim)] * 4 + [(wide, dim)] * 3
    return [[torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(layers)] for shape in shapes]


def ours(groups: Groups, block: int) -> Tensor:
    return loop_similarity(groups, block).mean


def handwritten(groups: Groups, block: int) -> Tensor:
    values = []
    for tensors in groups:
        pairs = [F.cosine_similarity(u.flatten(), v.flatten(), dim=0) for u, v in zip(tensors, tensors[block:])]
        values.append(torch.stack(pairs).mean())
    return torch.stack(values).mean()


def check(dim: int, layers: int, block: int, dtype: torch.dtype, device: str) -> None:
    """No number on a wrong result: the value and all gradients of smaller matrices against eager in float64."""
    groups = make(dim, layers, dtype, device, 64 / dim)
    wide = [[t.detach().double().requires_grad_() for t in tensors] for tensors in groups]
    results = []
    for given, function in ((groups, ours), (wide, handwritten)):
        value = function(given, block)
        results.append([value, *torch.autograd.grad(value, [t for tensors in given for t in tensors])])
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    # Cosines of random matrices are near 0.
    errors = [(results[0][0].double() - results[1][0]).abs().item()]
    errors += [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results[0][1:], results[1][1:])]
    if not max(errors) <= bound:
        raise SystemExit(f"wrong result: error {max(errors):.1e} > {bound:.0e}; nothing is timed")


def variants(groups: Groups, block: int, which: str) -> dict[str, Callable[[], object]]:
    torch._dynamo.reset()
    compiled = torch.compile(handwritten, dynamic=False)
    flat = [t for tensors in groups for t in tensors]
    count = MOVES[which] * sum(t.numel() for t in flat) // 2
    source = torch.zeros(count, dtype=flat[0].dtype, device=flat[0].device)
    target = source.clone()

    def call(function: Callable[[Groups, int], Tensor]) -> Callable[[], object]:
        def run() -> object:
            if which == "both":
                return torch.autograd.grad(function(groups, block), flat)
            with torch.no_grad():
                return function(groups, block)

        return run

    return {
        "effkern": call(ours),
        "torch.compile": call(compiled),
        "eager": call(handwritten),
        "copy": lambda: target.copy_(source),
    }


HEAD = "| D | L | k | dtype | pass | effkern ms | spread | GB/s | of copy | compile x | cpu | eager x | cpu |"


def markdown(case: dict[str, Any], moved: int, t: dict[str, runner.Timing]) -> str:
    ours_ = t["effkern"]

    def ratio(name: str) -> str:
        return f"{t[name].wall / ours_.wall:.2f} | {t[name].cpu / ours_.cpu:.2f}"

    cells = [
        *(str(case[name]) for name in CASE[:-1]), f"{ours_.wall * 1e3:.1f}",
        f"{ours_.wall_low * 1e3:.1f}-{ours_.wall_high * 1e3:.1f}", f"{moved / ours_.wall / 1e9:.1f}",
        f"{t['copy'].wall / ours_.wall:.2f}", ratio("torch.compile"), ratio("eager"),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 2048])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if not a.json:
        print(json.dumps(runner.machine()))
        print(HEAD, "|" + "---|" * HEAD.count(" |"), sep="\n", flush=True)
    for dim, dtype, which in product(a.dims, a.dtypes, a.passes):
        case = dict(zip(CASE, (dim, a.layers, a.block, dtype, which, a.device)))
        check(dim, a.layers, a.block, getattr(torch, dtype), a.device)
        groups = make(dim, a.layers, getattr(torch, dtype), a.device)
        moved = MOVES[which] * sum(t.nbytes for tensors in groups for t in tensors)
        runs = {name: repeated(run) for name, run in variants(groups, a.block, which).items()}
        timings = runner.interleave({name: run for name, (run, _) in runs.items()}, a.rounds)
        timings = {
            name: runner.Timing(*(s / runs[name][1] for s in (t.wall, t.wall_low, t.wall_high, t.cpu)))
            for name, t in timings.items()
        }
        if a.json:
            print("\n".join(runner.result_lines("loop_similarity", case, timings, {})), flush=True)
        else:
            print(markdown(case, moved, timings), flush=True)


if __name__ == "__main__":
    main()
