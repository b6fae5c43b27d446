"""loop_step beside eager, torch.compile and a copy of the bytes that it must move.

    python -m benchmarks.ops.loop_step                               all forms and sizes, float32 and bfloat16
    python -m benchmarks.ops.loop_step --forms glue --dims 768 --rows 8192 --dtypes float32 --pass both

Forms: `damped` h + (F(h) - h) / 4; `glue` RMSNorm(f + h) w, plus e and a loop embedding as the core's next input, with
the change of each token; `learned` the same with a learned number before each of the four streams.
Moves count what must be read and written of N x D elements: damped forward f, h, s (3), backward g, df, dh (3); glue
forward f, h, e, s, x (5), backward the gradients of s and x, s, df (4), as dh is df and that of e that of x; learned
backward also f, h, e, dh and de, and s~ from f and h instead of s, but s for its scale (9). `copy`, the floor, moves as
many bytes by Tensor.copy_ into memory that exists; the op's results are fresh memory, as they are in training.
"""

from collections.abc import Callable, Sequence

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import (
    Axis,
    Case,
    Huge,
    Op,
    Prepared,
    Run,
    Scaling,
    Work,
    WrongResult,
    bound_of,
    compiled,
    item_bytes,
    num_bytes,
    passes,
)  # fmt: skip
from effkern import loop_step

FORMS = ("damped", "glue", "learned")
PASSES = ("forward", "both")
MOVES = {("damped", "forward"): 3, ("damped", "both"): 6, ("glue", "forward"): 5, ("glue", "both"): 9,
         ("learned", "forward"): 5, ("learned", "both"): 14}  # fmt: skip
EPS = 1e-6
CHECK_ROWS = 64
Inputs = dict[str, Tensor]
Function = Callable[[Inputs], tuple[Tensor, ...]]


def make(case: Case) -> Inputs:
    torch.manual_seed(0)
    form, dim, dtype = case["form"], case["dim"], getattr(torch, case["dtype"])
    names = ("f", "h", "e")[: 2 if form == "damped" else 3]
    made = {name: torch.randn(case["rows"], dim).to(dtype) for name in names}
    if form != "damped":
        made["norm_weight"] = (1 + 0.1 * torch.randn(dim)).to(dtype)
        made["embedding"] = (0.1 * torch.randn(dim)).to(dtype)
    if form == "learned":
        made |= {name: 1 + 0.1 * torch.randn(1) for name in ("alpha", "beta", "state_scale", "input_scale")}
    return {name: t.to(case["device"]).requires_grad_() for name, t in made.items()}


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


def copy(i: Inputs, moves: int) -> Run:
    source = torch.zeros(moves * i["h"].numel() // 2, dtype=i["h"].dtype, device=i["h"].device)
    target = source.clone()
    return lambda: target.copy_(source)


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    i, which = make(case), case["pass"]
    grads = [torch.randn_like(i["h"]) for _ in range(2 if "e" in i else 1)]
    functions: dict[str, Function] = {
        "effkern": ours,
        "torch.compile": lambda i: compiled(handwritten)(i),
        "eager": handwritten,
    }

    def call(function: Function) -> Run:
        return passes(which, lambda: function(i), list(i.values()), grads)

    made = {name: copy(i, MOVES[case["form"], which]) if name == "copy" else call(functions[name]) for name in names}
    return Prepared(made, held=num_bytes(*i.values(), *grads))


def check(case: Case) -> None:
    """Results and gradients of a few rows against eager in float64."""
    i = make({**case, "rows": min(case["rows"], CHECK_ROWS)})

    def results(function: Function, dtype: torch.dtype | None) -> list[Tensor]:
        part = {k: t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for k, t in i.items()}
        out = function(part)
        generator = torch.Generator().manual_seed(1)
        kept = [y for y in out if y.requires_grad]
        grads = [torch.randn(y.shape, generator=generator).to(y.device, i["h"].dtype).to(y.dtype) for y in kept]
        return [*out, *torch.autograd.grad(kept, list(part.values()), grads)]

    bound = bound_of(case["dtype"])
    for got, want in zip(results(ours, None), results(handwritten, torch.float64)):
        # A single number is a sum of both signs: of the size that its terms have together.
        size = want.norm() if want.numel() > 1 else want.norm() + i["h"].numel() ** 0.5
        error = ((got.double() - want).norm() / size).item()
        if not error <= bound:
            raise WrongResult(f"wrong result: relative error {error:.1e} > {bound:.0e}; nothing is timed")


def work(case: Case) -> Work:
    return Work(MOVES[case["form"], case["pass"]] * case["rows"] * case["dim"] * item_bytes(case["dtype"]))


def huge() -> Huge:
    """More than 2^31 elements in each tensor; the last rows must be what they are alone."""
    rows, dim = (1 << 31) // 4096 + 8, 4096

    def run() -> None:
        small = make({"form": "damped", "rows": 8, "dim": dim, "dtype": "bfloat16", "device": "cpu"})
        with torch.no_grad():
            wide = {k: t.detach().expand(rows // 8, 8, dim).reshape(rows, dim) for k, t in small.items()}
            if not torch.equal(ours(wide)[0][-8:], ours(small)[0]):
                raise WrongResult("wrong result in the last rows")

    return Huge(3 * rows * dim * 2, f"damped, forward, {rows} x {dim}, bfloat16", run)


OP = Op(
    name="loop_step",
    doc=__doc__,
    axes=(
        Axis("form", "--forms", FORMS, FORMS),
        Axis("rows", "--rows", (1, 512, 8192)),
        Axis("dim", "--dims", (768, 2048)),
        Axis("dtype", "--dtypes", ("float32", "bfloat16"), ("float32", "bfloat16")),
        Axis("pass", "--pass", PASSES, PASSES),
    ),
    variants=("effkern", "torch.compile", "eager", "copy"),
    check=check,
    prepare=prepare,
    work=work,
    floor={"copy": 1.0},
    registry=("loop_step",),
    why=lambda case: [f"{MOVES[case['form'], case['pass']]} moves of N D elements, no products"],
    rotates=True,
    scaling=(
        Scaling("rows", (256, 512, 1024, 2048, 4096),
                {"form": "glue", "dim": 768, "dtype": "float32", "pass": "both"}, "1: every row costs the same"),
    ),
    huge=huge,
)  # fmt: skip

if __name__ == "__main__":
    harness.main(OP)
