"""looped_linear_attention beside loops written in PyTorch, torch.compile, and what its multiply-adds take at the least.

    python -m benchmarks.ops.looped_linear_attention                       batches of 64 and 512, n = 64, d = 20, L = 32
    python -m benchmarks.ops.looped_linear_attention --batches 512 --examples 10 --free --json

Variants: `loop` w <- w + A^T X^T (y - X w) / n, three products per loop, as one writes it; `moments` the same after S =
X^T X / n and b = X^T y / n, two small products per loop; `compile` the faster of the two under torch.compile; `paper`
the whole prompt through every layer (--paper: a hundred times slower). The floor is the multiply-adds of the form that
the op takes, forward and backward (problem.products and what all forms share), at the rate at which torch.mm does those
of a square product of 1024.
"""

import argparse
from collections.abc import Callable, Sequence

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness, runner  # isort: skip

import torch
from torch import Tensor

from benchmarks.case import Axis, Case, Op, Prepared, Run, Scaling, Work, compiled, hold, passes
from effkern import looped_linear_attention
from effkern.ops.looped_linear_attention import reference
from effkern.ops.looped_linear_attention.problem import FORMS, cheapest, products

# Of the product whose rate the floor takes.
ORDER = 1024
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Function = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def make(batch: int, examples: int, dim: int, loops: int, free: bool) -> Inputs:
    torch.manual_seed(0)
    x = torch.randn(batch, examples, dim)
    rate = examples / torch.linalg.matrix_norm(x, 2).square().max().item()
    a = rate * (torch.eye(dim) + 0.1 * torch.randn(*((loops,) if free else ()), dim, dim) / dim**0.5)
    return tuple(t.requires_grad_() for t in (x, torch.randn(batch, examples), torch.randn(batch, dim), a))  # type: ignore[return-value]


def effkern_op(x: Tensor, y: Tensor, query: Tensor, a: Tensor, loops: int) -> Tensor:
    return looped_linear_attention(x, y, query, a, loops).prediction


def plain_loop(x: Tensor, y: Tensor, query: Tensor, a: Tensor, loops: int) -> Tensor:
    w = torch.zeros_like(query)
    for layer in range(loops):
        residual = y - torch.bmm(x, w[:, :, None])[:, :, 0]
        gradient = torch.bmm(residual[:, None], x)[:, 0]
        w = w + gradient @ (a if a.dim() == 2 else a[layer]) / x.shape[1]
    return (w * query).sum(1)


def moments_loop(x: Tensor, y: Tensor, query: Tensor, a: Tensor, loops: int) -> Tensor:
    gram = torch.bmm(x.transpose(1, 2), x) / x.shape[1]
    moment = torch.bmm(y[:, None], x)[:, 0] / x.shape[1]
    w = torch.zeros_like(query)
    for layer in range(loops):
        residual = moment - torch.bmm(gram, w[:, :, None])[:, :, 0]
        w = w + residual @ (a if a.dim() == 2 else a[layer])
    return (w * query).sum(1)


def paper(x: Tensor, y: Tensor, query: Tensor, a: Tensor, loops: int) -> Tensor:
    return reference.looped_linear_attention(x, y, query[:, None], a, loops)[-1, :, 0]


FUNCTIONS: dict[str, Function] = {"effkern": effkern_op, "loop": plain_loop, "moments": moments_loop, "paper": paper}


def inputs_of(case: Case) -> Inputs:
    return make(case["batch"], case["examples"], case["dim"], case["loops"], case["free"])


def check(case: Case) -> None:
    """Prediction and gradients of a few problems against the paper's form in float64."""
    inputs = inputs_of({**case, "batch": min(case["batch"], 16)})
    grad = torch.randn(inputs[0].shape[0])

    def results(function: Function, dtype: torch.dtype) -> list[Tensor]:
        x, y, query, a = part = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = function(x, y, query, a, case["loops"])
        return [out, *torch.autograd.grad(out, part, grad.to(dtype))]

    hold(zip(results(effkern_op, torch.float32), results(paper, torch.float64)), 1e-3)


def multiply_adds(case: Case, backward: bool) -> int:
    """Of the whole batch; `products` counts forward and backward of the loops and of what they need."""
    n, d, loops = case["examples"], case["dim"], case["loops"]
    form = cheapest(n, d, 1, loops, not case["free"])
    total = products(form, n, d, 1, loops)
    if not backward:
        total = {
            "factors": n * d * d // 2 + 2 * loops * d * d,
            "primal": n * d * d // 2 + d**3 + loops * d * d,
            "dual": n * d * d + n * n * d + loops * n * n,
        }[form]
    return case["batch"] * total


def floor_run() -> Run:
    """A square product of 1024; its time times the share of the multiply-adds is the floor."""
    a, b = torch.randn(2, ORDER, ORDER)
    out = torch.empty(ORDER, ORDER)
    return lambda: torch.mm(a, b, out=out)


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    inputs, loops = inputs_of(case), case["loops"]
    grad = torch.randn(inputs[0].shape[0])

    def call(function: Function) -> Run:
        return passes(case["pass"], lambda: (function(*inputs, loops),), inputs, [grad])

    made: dict[str, Run] = {}
    for name in names:
        if name == "mm 1024":
            made[name] = floor_run()
        elif name == "compile":
            first = runner.interleave({k: call(FUNCTIONS[k]) for k in ("loop", "moments")}, 3, 1)
            faster = min(first, key=lambda k: first[k].wall)
            made[name] = call(compiled(FUNCTIONS[faster]))
        else:
            made[name] = call(FUNCTIONS[name])
    share = multiply_adds(case, case["pass"] == "both") / ORDER**3
    return Prepared(made, sums={"floor": {"mm 1024": share}} if "mm 1024" in made else {})


def work(case: Case) -> Work:
    b, n, d, both = case["batch"], case["examples"], case["dim"], case["pass"] == "both"
    numbers = b * (n * d + n + d) + d * d * (case["loops"] if case["free"] else 1)
    return Work(4 * (numbers * (3 if both else 1) + b), 2.0 * multiply_adds(case, both))


def why(case: Case) -> list[str]:
    n, d, loops = case["examples"], case["dim"], case["loops"]
    counts = ", ".join(f"{form} {products(form, n, d, 1, loops):,}" for form in FORMS)
    chosen = cheapest(n, d, 1, loops, not case["free"])
    reason = "a matrix per loop leaves no other" if case["free"] else "the fewest"
    return [f"form {chosen}: {reason}; multiply-adds of a problem, both passes: {counts}"]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paper", action="append_const", const="paper", dest="more", help="also the paper's form")


OP = Op(
    name="looped_linear_attention",
    doc=__doc__,
    axes=(
        Axis("batch", "--batches", (64, 512)),
        Axis("examples", "--examples", (64,)),
        Axis("dim", "--dim", (20,)),
        Axis("loops", "--loops", (32,)),
        Axis("free", "--free", (False,), help="a preconditioner per loop"),
        Axis("pass", "--pass", ("forward", "both"), ("forward", "both")),
    ),
    variants=("effkern", "loop", "moments", "compile", "paper", "mm 1024"),
    check=check,
    prepare=prepare,
    work=work,
    works=lambda case: {"mm 1024": Work(0.0, 2.0 * ORDER**3)},
    floor={"floor": 1.0},
    needs=("mm 1024",),
    optional=("paper",),
    registry=("looped_linear_attention",),
    why=why,
    options=options,
    devices=("cpu",),
    rounds=15,
    threads=0,
    scaling=(
        Scaling("batch", (64, 128, 256, 512, 1024), {"loops": 32, "pass": "both"}, "1: every problem costs the same"),
        Scaling("loops", (8, 16, 32, 64, 128), {"batch": 64, "pass": "both"}, "from 0 (moments) to 1 (loops)"),
    ),
    no_huge="a problem holds N D numbers, and each is taken alone",
)  # fmt: skip

if __name__ == "__main__":
    harness.main(OP)
