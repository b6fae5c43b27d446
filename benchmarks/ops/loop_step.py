"""loop_step beside eager, torch.compile and a copy of the bytes that it must move.

    python -m benchmarks.ops.loop_step                               all forms and sizes, float32 and bfloat16
    python -m benchmarks.ops.loop_step --forms glue --dims 768 --rows 8192 --dtypes float32 --pass both

Forms: `damped` h + (F(h) - h) / 4; `glue` RMSNorm(f + h) w, plus e and a loop embedding as the core's next input, with
the change of each token; `learned` the same with a learned number before each of the four streams.
Moves count what must be read and written of N x D elements: damped forward f, h, s (3), backward g, df, dh (3); glue
forward f, h, e, s, x (5), backward the gradients of s and x, s, df, dh (5), as that of e is that of x; learned backward
also f, h, e and de, and s~ from f and h instead of s, but s for its scale (9). `copy` moves as many bytes by
Tensor.copy_ into memory that exists; the op's results are fresh memory, as they are in training.
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
from effkern import loop_step

FORMS = ("damped", "glue", "learned")
PASSES = ("forward", "both")
MOVES = {("damped", "forward"): 3, ("damped", "both"): 6, ("glue", "forward"): 5, ("glue", "both"): 10,
         ("learned", "forward"): 5, ("learned", "both"): 14}  # fmt: skip
EPS = 1e-6
CHECK_ROWS = 64
CASE = ("form", "rows", "dim", "dtype", "pass", "device")
Inputs = dict[str, Tensor]
Function = Callable[[Inputs], tuple[Tensor, ...]]


def make(form: str, rows: int, dim: int, dtype: torch.dtype, device: str) -> Inputs:
    torch.manual_seed(0)
    made = {name: torch.randn(rows, dim).to(dtype) for name in ("f", "h", "e")[: 2 if form == "damped" else 3]}
    if form != "damped":
        made["norm_weight"] = (1 + 0.1 * torch.randn(dim)).to(dtype)
        made["embedding"] = (0.1 * torch.randn(dim)).to(dtype)
    if form == "learned":
        made |= {name: 1 + 0.1 * torch.randn(1) for name in ("alpha", "beta", "state_scale", "input_scale")}
    return {name: t.to(device).requires_grad_() for name, t in made.items()}


def ours(i: Inputs) -> tuple[Tensor, ...]:
    if "e" not in i:
        return (loop_step(i["f"], i["h"], alpha=0.25, beta=0.75).state,)
    out = loop_step(**({"beta": 1.0} | i), eps=EPS, return_change=True)  # type: ignore[arg-type]
    assert out.change is not None
    return out.state, out.core_input, out.change


def handwritten(i: Inputs) -> tuple[Tensor, ...]:
    f, h = i["f"], i["h"]
    if "e" not in i:
        return (h + (f - h) / 4,)
    alpha, beta, state_scale, input_scale = (
        i[name].to(h.dtype) if name in i else 1.0 for name in ("alpha", "beta", "state_scale", "input_scale")
    )
    s = alpha * f + beta * h if "alpha" in i else f + h
    s = F.rms_norm(s, s.shape[-1:], i["norm_weight"], EPS)
    x = state_scale * s + input_scale * i["e"] if "alpha" in i else s + i["e"]
    with torch.no_grad():
        change = (s - h).float().norm(dim=-1) / s.float().norm(dim=-1)
    return s, x + i["embedding"], change


def call(i: Inputs, function: Function, which: str) -> Callable[[], object]:
    """Forward alone as inference has it, or forward and all gradients."""
    if which == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(i)

        return forward
    grads = [torch.randn_like(i["h"]) for _ in range(2 if "e" in i else 1)]
    return lambda: torch.autograd.grad(function(i)[: len(grads)], list(i.values()), grads)


def copy(i: Inputs, moves: int) -> Callable[[], object]:
    source = torch.zeros(moves * i["h"].numel() // 2, dtype=i["h"].dtype, device=i["h"].device)
    target = source.clone()
    return lambda: target.copy_(source)


def variants(i: Inputs, form: str, which: str) -> dict[str, Callable[[], object]]:
    torch._dynamo.reset()
    compiled = torch.compile(handwritten, dynamic=False)
    return {
        "effkern": call(i, ours, which),
        "torch.compile": call(i, compiled, which),
        "eager": call(i, handwritten, which),
        "copy": copy(i, MOVES[form, which]),
    }


def check(i: Inputs) -> None:
    """No number on a wrong result: results and gradients of the first rows against eager in float64."""

    def results(function: Function, dtype: torch.dtype | None) -> list[Tensor]:
        part = {k: (t[:CHECK_ROWS] if t.dim() == 2 else t).detach() for k, t in i.items()}
        part = {k: t.to(dtype or t.dtype, copy=True).requires_grad_() for k, t in part.items()}
        out = function(part)
        generator = torch.Generator().manual_seed(1)
        kept = [y for y in out if y.requires_grad]
        grads = [torch.randn(y.shape, generator=generator).to(y.device, i["h"].dtype).to(y.dtype) for y in kept]
        return [*out, *torch.autograd.grad(kept, list(part.values()), grads)]

    bound = 1e-5 if i["h"].dtype == torch.float32 else 2e-2
    for got, want in zip(results(ours, None), results(handwritten, torch.float64)):
        # A single number is a sum of both signs: of the size that its terms have together.
        size = want.norm() if want.numel() > 1 else want.norm() + i["h"][:CHECK_ROWS].numel() ** 0.5
        error = ((got.double() - want).norm() / size).item()
        if not error <= bound:
            raise SystemExit(f"wrong result: relative error {error:.1e} > {bound:.0e}; nothing is timed")


def measure(case: dict[str, Any], rounds: int) -> dict[str, runner.Timing]:
    i = make(case["form"], case["rows"], case["dim"], getattr(torch, case["dtype"]), case["device"])
    check(i)
    runs = {name: repeated(run) for name, run in variants(i, case["form"], case["pass"]).items()}
    timings = runner.interleave({name: run for name, (run, _) in runs.items()}, rounds)
    return {
        name: runner.Timing(*(seconds / runs[name][1] for seconds in (t.wall, t.wall_low, t.wall_high, t.cpu)))
        for name, t in timings.items()
    }


HEAD = (
    "| form | N | D | dtype | pass | effkern us | spread | GB/s | copy us | of copy | compile x | cpu | eager x | cpu |"
)


def markdown(case: dict[str, Any], t: dict[str, runner.Timing]) -> str:
    ours_, copied = t["effkern"], t["copy"]
    size = torch.empty(0, dtype=getattr(torch, case["dtype"])).element_size()
    moved = MOVES[case["form"], case["pass"]] * case["rows"] * case["dim"] * size

    def ratio(name: str) -> str:
        return f"{t[name].wall / ours_.wall:.2f} | {t[name].cpu / ours_.cpu:.2f}"

    cells = [
        *(str(case[name]) for name in CASE[:-1]), f"{ours_.wall * 1e6:.0f}",
        f"{ours_.wall_low * 1e6:.0f}-{ours_.wall_high * 1e6:.0f}", f"{moved / ours_.wall / 1e9:.1f}",
        f"{copied.wall * 1e6:.0f}", f"{copied.wall / ours_.wall:.2f}", ratio("torch.compile"), ratio("eager"),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512, 8192])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if not a.json:
        print(json.dumps(runner.machine()))
        print(HEAD, "|" + "---|" * HEAD.count(" |"), sep="\n", flush=True)
    for values in product(a.forms, a.rows, a.dims, a.dtypes, a.passes, [a.device]):
        case = dict(zip(CASE, values))
        timings = measure(case, a.rounds)
        if a.json:
            print("\n".join(runner.result_lines("loop_step", case, timings, {})), flush=True)
        else:
            print(markdown(case, timings), flush=True)


if __name__ == "__main__":
    main()
