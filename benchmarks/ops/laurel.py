"""laurel_residual (RW+LR with the norm behind it) beside eager, torch.compile and what it cannot go below.

    python -m benchmarks.ops.laurel                                  all sizes, float32 and bfloat16
    python -m benchmarks.ops.laurel --dims 768 --ranks 32 --rows 8192 --dtypes float32 --pass forward
    python -m benchmarks.ops.laurel --memory                         also peak memory, each in a process of its own

The floor of a residual with a low-rank map is a plain one, `laurel_residual(branch, x, norm_weight=w)`, plus
the bare skinny products by torch.mm, all rows at once, into buffers that exist: forward x A and u B, backward also
g B^T, dU A^T, x^T dU and u^T g. Moves count what the op must read and write of N x D elements: forward reads f and x
and writes y and z (4); backward reads the gradients of y and z, x and y, and writes those of f and x (6). `copy` moves
as many bytes by Tensor.copy_ into memory that exists. malloc keeps the memory of earlier results (runner.keep_memory),
as every allocator with a cache does; `--fresh` leaves it as it is, and which variant then pays for page faults is luck.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern import laurel_residual

PASSES = ("forward", "both")
MOVES = {"forward": 4, "both": 10}
EPS = 1e-6
CHECK_ROWS = 64
# One timing repeats a short call for about as long. Memory that the variant before gave back to the system is then
# charged to few of the calls.
LEAST_SECONDS = 0.1
CASE = ("rows", "dim", "rank", "dtype", "pass")


@dataclass
class Inputs:
    branch: Tensor  # [N, D]
    x: Tensor  # [N, D]
    weights: Tensor  # [2]
    down: Tensor  # [D, r]
    up: Tensor  # [r, D]
    norm_weight: Tensor  # [D]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.branch, self.x, self.weights, self.down, self.up, self.norm_weight)


def make(rows: int, dim: int, rank: int, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    norm_weight = 1 + 0.1 * torch.randn(dim)
    made = Inputs(
        torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).to(dtype), 0.3 * torch.randn(2),
        (torch.randn(dim, rank) / dim**0.5).to(dtype), (torch.randn(rank, dim) / rank**0.5).to(dtype),
        norm_weight.to(dtype),
    )  # fmt: skip
    for t in made.tensors():
        t.requires_grad_()
    return made


Function = Callable[[Inputs], tuple[Tensor, Tensor]]


def effkern_residual(i: Inputs) -> tuple[Tensor, Tensor]:
    out = laurel_residual(
        i.branch, i.x, weights=i.weights, down=i.down, up=i.up, norm_weight=i.norm_weight, norm_eps=EPS
    )
    assert out.normed is not None
    return out.y, out.normed


def effkern_plain(i: Inputs) -> tuple[Tensor, Tensor]:
    out = laurel_residual(i.branch, i.x, norm_weight=i.norm_weight, norm_eps=EPS)
    assert out.normed is not None
    return out.y, out.normed


def eager_residual(i: Inputs) -> tuple[Tensor, Tensor]:
    return handwritten(*i.tensors())


def handwritten(f: Tensor, x: Tensor, weights: Tensor, down: Tensor, up: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    alpha, beta = 2 * weights.softmax(0).to(x.dtype)
    y = alpha * f + beta * (x + (x @ down) @ up)
    return y, F.rms_norm(y, w.shape, w, EPS)


def call(i: Inputs, function: Function, which: str) -> Callable[[], object]:
    """Forward alone as inference has it, or forward and the gradients of all that the function reads."""
    if which == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(i)

        return forward
    grads = torch.randn_like(i.x), torch.randn_like(i.x)
    used = i.tensors() if function is not effkern_plain else (i.branch, i.x, i.norm_weight)
    return lambda: torch.autograd.grad(function(i), used, grads)


def products(i: Inputs, which: str) -> Callable[[], None]:
    x, down, up = i.x.detach(), i.down.detach(), i.up.detach()
    g = torch.randn_like(x)
    wide, u, grad_u = torch.empty_like(x), x @ down, torch.randn(x.shape[0], up.shape[0]).to(x.dtype)
    grad_down, grad_up = torch.empty_like(down), torch.empty_like(up)

    def run() -> None:
        torch.mm(x, down, out=u)
        torch.mm(u, up, out=wide)
        if which == "both":
            torch.mm(g, up.t(), out=grad_u)
            torch.mm(grad_u, down.t(), out=wide)
            torch.mm(x.t(), grad_u, out=grad_down)
            torch.mm(u.t(), g, out=grad_up)

    return run


def copy(i: Inputs, which: str) -> Callable[[], object]:
    source = torch.randn(MOVES[which] // 2, *i.x.shape).to(i.x.dtype)
    target = source.clone()
    return lambda: target.copy_(source)


def variants(i: Inputs, which: str) -> dict[str, Callable[[], object]]:
    torch._dynamo.reset()
    compiled = torch.compile(handwritten, dynamic=False)
    return {
        "effkern": call(i, effkern_residual, which),
        "add+norm": call(i, effkern_plain, which),
        "products": products(i, which),
        "torch.compile": call(i, lambda i: compiled(*i.tensors()), which),
        "eager": call(i, eager_residual, which),
        "copy": copy(i, which),
    }


def check(i: Inputs) -> None:
    """No number on a wrong result: both outputs and all gradients of the first rows against eager in float64."""

    def results(function: Function, dtype: torch.dtype) -> list[Tensor]:
        tensors = [t.detach()[:CHECK_ROWS] if t is i.branch or t is i.x else t.detach() for t in i.tensors()]
        part = Inputs(*((t.double() if dtype == torch.float64 else t).clone().requires_grad_() for t in tensors))
        out = function(part)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(y.shape, generator=generator).to(i.x.dtype).to(y.dtype) for y in out]
        return [*out, *torch.autograd.grad(out, part.tensors(), grads)]

    bound = 1e-5 if i.x.dtype == torch.float32 else 2e-2
    for got, want in zip(results(effkern_residual, i.x.dtype), results(eager_residual, torch.float64)):
        error = ((got.double() - want).norm() / want.norm()).item()
        if not error <= bound:
            raise SystemExit(f"wrong result: relative error {error:.1e} > {bound:.0e}; nothing is timed")


def repeated(run: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """A function that lasts long enough to be timed, and how many calls it makes."""
    run()
    start = time.perf_counter()
    run()
    count = max(1, int(LEAST_SECONDS / (time.perf_counter() - start)))

    def many() -> None:
        for _ in range(count):
            run()

    return many, count


def measure(case: dict, rounds: int) -> dict[str, runner.Timing]:
    i = make(case["rows"], case["dim"], case["rank"], getattr(torch, case["dtype"]))
    check(i)
    runs = {name: repeated(run) for name, run in variants(i, case["pass"]).items()}
    timings = runner.interleave({name: run for name, (run, _) in runs.items()}, rounds)
    return {
        name: runner.Timing(*(seconds / runs[name][1] for seconds in (t.wall, t.wall_low, t.wall_high, t.cpu)))
        for name, t in timings.items()
    }


def peaks(case: dict, threads: int) -> dict[str, dict]:
    """MiB beyond the inputs, by variant."""
    options = [f"--{name if name in ('rows', 'pass') else name + 's'}={case[name]}" for name in CASE]
    return {
        name: {
            "peak_mib": int(
                runner.in_fresh_process("benchmarks.ops.laurel", *options, f"--threads={threads}", f"--peak-of={name}")
            )
            / 2**20
        }
        for name in ("effkern", "add+norm", "torch.compile", "eager")
    }


HEAD = (
    "| N | D | r | dtype | pass | effkern us | spread | GB/s | of copy | x add+norm + products | cpu | compile x | cpu "
    "| eager x | cpu | peak MiB: effkern, add+norm, compile, eager |"
)


def markdown(case: dict, t: dict[str, runner.Timing], extra: dict[str, dict]) -> str:
    ours, base, bare = t["effkern"], t["add+norm"], t["products"]
    size = torch.empty(0, dtype=getattr(torch, case["dtype"])).element_size()
    moved = MOVES[case["pass"]] * case["rows"] * case["dim"] * size

    def ratio(name: str) -> str:
        return f"{t[name].wall / ours.wall:.2f} | {t[name].cpu / ours.cpu:.2f}"

    cells = [
        *(str(case[name]) for name in CASE), f"{ours.wall * 1e6:.0f}",
        f"{ours.wall_low * 1e6:.0f}-{ours.wall_high * 1e6:.0f}", f"{moved / ours.wall / 1e9:.1f}",
        f"{t['copy'].wall / ours.wall:.2f}", f"{ours.wall / (base.wall + bare.wall):.2f}",
        f"{ours.cpu / (base.cpu + bare.cpu):.2f}", ratio("torch.compile"), ratio("eager"),
        ", ".join(f"{e['peak_mib']:.0f}" for e in extra.values()) or "-",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512, 8192])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="also peak memory beyond the inputs")
    parser.add_argument("--fresh", action="store_true", help="leave malloc as it is")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    cases = [
        dict(zip(CASE, values))
        for values in product(a.rows, a.dims, a.ranks, a.dtypes, a.passes)
    ]  # fmt: skip
    if a.peak_of:
        (case,) = cases
        shape = (case["rows"], case["dim"], case["rank"], getattr(torch, case["dtype"]))
        print(runner.peak_memory(lambda: variants(make(*shape), case["pass"])[a.peak_of]))
        return
    if not a.fresh:
        runner.keep_memory()
    if not a.json:
        print(json.dumps(runner.machine()))
        print(HEAD, "|" + "---|" * HEAD.count(" |"), sep="\n", flush=True)
    for case in cases:
        timings = measure(case, a.rounds)
        extra = peaks(case, a.threads) if a.memory else {}
        if a.json:
            print("\n".join(runner.result_lines("laurel", case, timings, extra)), flush=True)
        else:
            print(markdown(case, timings, extra), flush=True)


if __name__ == "__main__":
    main()
