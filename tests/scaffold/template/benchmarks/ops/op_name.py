"""op_name beside eager, torch.compile and a copy of the bytes that it must move.

    python -m benchmarks op_name [--rows 8192 --dims 768 2048 --dtypes float32 bfloat16 --pass forward both]

Moves are of N x D elements: forward reads two and writes one, backward reads three and writes two (8 in both). `copy`,
the floor, moves as many bytes by Tensor.copy_.
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
    hold,
    item_bytes,
    num_bytes,
    passes,
)  # fmt: skip
from effkern.ops.op_name import op_name

PASSES = ("forward", "both")
MOVES = {"forward": 3, "both": 8}
CHECK = {"rows": 40, "dim": 33}


def make(case: Case) -> tuple[list[Tensor], Tensor]:
    """Gate and up, and the gradient of the result."""
    torch.manual_seed(0)
    shape, dtype = (case["rows"], case["dim"]), getattr(torch, case["dtype"])
    gate, up, grad = (torch.randn(shape).to(case["device"], dtype) for _ in range(3))
    return [gate.requires_grad_(), up.requires_grad_()], grad


def handwritten(gate: Tensor, up: Tensor) -> Tensor:
    return F.relu(gate).square() * up


def check(case: Case) -> None:
    """Result and gradients against eager in float64."""
    inputs, grad = make({**case, **CHECK})
    wide = [t.detach().double().requires_grad_() for t in inputs]
    results = []
    for given, of_result, function in ((inputs, grad, op_name), (wide, grad.double(), handwritten)):
        y = function(*given)
        results.append([y, *torch.autograd.grad(y, given, of_result)])
    hold(zip(*results), bound_of(case["dtype"], half=1e-2))


def copy(like: Tensor, moves: int) -> Run:
    source = torch.zeros(moves * like.numel() // 2, dtype=like.dtype, device=like.device)
    target = source.clone()
    return lambda: target.copy_(source)


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    inputs, grad = make(case)
    functions: dict[str, Callable[..., Tensor]] = {
        "effkern": op_name,
        "torch.compile": lambda *given: compiled(handwritten)(*given),
        "eager": handwritten,
    }
    made: dict[str, Run] = {}
    for name in names:
        if name == "copy":
            made[name] = copy(grad, MOVES[case["pass"]])
        else:
            call = functions[name]
            made[name] = passes(case["pass"], lambda call=call: (call(*inputs),), inputs, [grad])  # type: ignore[misc]
    return Prepared(made, held=num_bytes(*inputs, grad))


def work(case: Case) -> Work:
    return Work(MOVES[case["pass"]] * case["rows"] * case["dim"] * item_bytes(case["dtype"]))


def huge() -> Huge:
    """More than 2^31 elements, of which only the last row is not 0."""
    rows, dim = (1 << 31) // 4096 + 8, 4096

    def run() -> None:
        gate = torch.zeros(rows, dim, dtype=torch.bfloat16)
        gate[-1] = 3.0
        if not (op_name(gate, gate)[-1] == 27.0).all():
            raise WrongResult("wrong result: the last row is not in it")

    return Huge(2 * rows * dim * 2, f"forward, {rows} x {dim}, bfloat16", run)


SCALED = {"rows": 256, "dim": 1024, "dtype": "float32", "pass": "both"}
OP = Op(
    name="op_name",
    doc=__doc__,
    axes=(
        Axis("rows", "--rows", (8192,)),
        Axis("dim", "--dims", (768, 2048)),
        Axis("dtype", "--dtypes", ("float32", "bfloat16"), ("float32", "bfloat16")),
        Axis("pass", "--pass", PASSES, PASSES),
    ),
    variants=("effkern", "torch.compile", "eager", "copy"),
    check=check,
    prepare=prepare,
    work=work,
    floor={"copy": 1.0},
    registry=("op_name",),
    why=lambda case: [f"{MOVES[case['pass']]} moves of N x D elements, no products"],
    rotates=True,
    rounds=5,
    scaling=(Scaling("rows", (256, 512, 1024, 2048, 4096), SCALED, "1: every row costs the same"),),
    huge=huge,
)

if __name__ == "__main__":
    harness.main(OP)
