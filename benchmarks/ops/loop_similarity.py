"""loop_similarity beside eager, torch.compile and a copy of the bytes that it must move.

    python -m benchmarks.ops.loop_similarity                         D = 768 and 2048, float32 and bfloat16
    python -m benchmarks.ops.loop_similarity --dims 768 --layers 12 --block 4 --dtypes float32

The seven matrices of each layer of a decoder (4 of D x D, 3 of D x F, F = 8/3 D). Moves are of all parameters: forward
reads them once (1), backward reads them and writes their gradients (3 in both). `eager` is cosine_similarity of each
pair, which reads all but the outer blocks' tensors twice; `copy`, the floor, moves as many bytes by Tensor.copy_.
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
from effkern import loop_similarity

PASSES = ("forward", "both")
MOVES = {"forward": 1, "both": 3}
CHECK_DIM = 64
Groups = list[list[Tensor]]


def shapes(dim: int) -> list[tuple[int, int]]:
    return [(dim, dim)] * 4 + [(max(64, dim * 8 // 3 // 64 * 64), dim)] * 3


def make(case: Case) -> Groups:
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    return [
        [torch.randn(shape).to(case["device"], dtype).requires_grad_() for _ in range(case["layers"])]
        for shape in shapes(case["dim"])
    ]


def ours(groups: Groups, block: int) -> Tensor:
    return loop_similarity(groups, block).mean


def handwritten(groups: Groups, block: int) -> Tensor:
    values = []
    for tensors in groups:
        pairs = [F.cosine_similarity(u.flatten(), v.flatten(), dim=0) for u, v in zip(tensors, tensors[block:])]
        values.append(torch.stack(pairs).mean())
    return torch.stack(values).mean()


def check(case: Case) -> None:
    """The value and all gradients of smaller matrices against eager in float64."""
    groups = make({**case, "dim": CHECK_DIM})
    wide = [[t.detach().double().requires_grad_() for t in tensors] for tensors in groups]
    results = []
    for given, function in ((groups, ours), (wide, handwritten)):
        value = function(given, case["block"])
        results.append([value, *torch.autograd.grad(value, [t for tensors in given for t in tensors])])
    bound = bound_of(case["dtype"], half=1e-2)
    # Cosines of random matrices are near 0.
    if not (error := (results[0][0].double() - results[1][0]).abs().item()) <= bound:
        raise WrongResult(f"wrong result: error {error:.1e} > {bound:.0e}; nothing is timed")
    hold(zip(results[0][1:], results[1][1:]), bound)


def copy(flat: list[Tensor], moves: int) -> Run:
    source = torch.zeros(moves * sum(t.numel() for t in flat) // 2, dtype=flat[0].dtype, device=flat[0].device)
    target = source.clone()
    return lambda: target.copy_(source)


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    groups = make(case)
    flat = [t for tensors in groups for t in tensors]
    functions: dict[str, Callable[[Groups, int], Tensor]] = {
        "effkern": ours, "torch.compile": lambda *given: compiled(handwritten)(*given), "eager": handwritten,
    }  # fmt: skip
    made: dict[str, Run] = {}
    for name in names:
        if name == "copy":
            made[name] = copy(flat, MOVES[case["pass"]])
        else:
            call = functions[name]
            grads = [torch.ones((), dtype=torch.float32 if name == "effkern" else flat[0].dtype, device=flat[0].device)]
            made[name] = passes(case["pass"], lambda call=call: (call(groups, case["block"]),), flat, grads)  # type: ignore[misc]
    return Prepared(made, held=num_bytes(*flat))


def work(case: Case) -> Work:
    count = case["layers"] * sum(m * n for m, n in shapes(case["dim"]))
    return Work(MOVES[case["pass"]] * count * item_bytes(case["dtype"]))


def huge() -> Huge:
    """Two matrices of more than 2^31 elements, of which only the last row is not 0."""
    rows, dim = (1 << 31) // 4096 + 8, 4096

    def run() -> None:
        groups = [[torch.zeros(rows, dim, dtype=torch.bfloat16) for _ in range(2)]]
        for i, t in enumerate(groups[0]):
            t[-1, : dim // (i + 1)] = 1.0
        if not abs(ours(groups, 1).item() - 0.5**0.5) < 1e-5:
            raise WrongResult("wrong result: the last row is not in it")

    return Huge(2 * rows * dim * 2, f"forward, two of {rows} x {dim}, bfloat16", run)


OP = Op(
    name="loop_similarity",
    doc=__doc__,
    axes=(
        Axis("dim", "--dims", (768, 2048)),
        Axis("layers", "--layers", (4,)),
        Axis("block", "--block", (2,)),
        Axis("dtype", "--dtypes", ("float32", "bfloat16"), ("float32", "bfloat16")),
        Axis("pass", "--pass", PASSES, PASSES),
    ),
    variants=("effkern", "torch.compile", "eager", "copy"),
    check=check,
    prepare=prepare,
    work=work,
    floor={"copy": 1.0},
    registry=("loop_similarity",),
    why=lambda case: [f"{MOVES[case['pass']]} moves of all parameters, no products"],
    rotates=True,
    rounds=5,
    scaling=(
        Scaling("dim", (96, 192, 384, 768, 1536),
                {"layers": 2, "block": 1, "dtype": "float32", "pass": "both"}, "2: matrices of order D"),
    ),
    huge=huge,
)  # fmt: skip

if __name__ == "__main__":
    harness.main(OP)
