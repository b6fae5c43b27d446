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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from effkern import laurel_residual

PASSES = ("forward", "both")
MOVES = {"forward": 4, "both": 10}
# Products of N r D multiply-adds.
PRODUCTS = {"forward": 2, "both": 6}
EPS = 1e-6
CHECK_ROWS = 64


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


def make(case: Case) -> Inputs:
    torch.manual_seed(0)
    rows, dim, rank, dtype = case["rows"], case["dim"], case["rank"], getattr(torch, case["dtype"])
    norm_weight = 1 + 0.1 * torch.randn(dim)
    made = Inputs(
        torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).to(dtype), 0.3 * torch.randn(2),
        (torch.randn(dim, rank) / dim**0.5).to(dtype), (torch.randn(rank, dim) / rank**0.5).to(dtype),
        norm_weight.to(dtype),
    )  # fmt: skip
    return Inputs(*(t.to(case["device"]).requires_grad_() for t in made.tensors()))


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


def products(i: Inputs, which: str) -> Run:
    x, down, up = i.x.detach(), i.down.detach(), i.up.detach()
    g = torch.randn_like(x)
    wide, u = torch.empty_like(x), x @ down
    grad_u = torch.randn_like(u)
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


def copy(i: Inputs, which: str) -> Run:
    source = torch.randn(MOVES[which] // 2, *i.x.shape, device=i.x.device).to(i.x.dtype)
    target = source.clone()
    return lambda: target.copy_(source)


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    i, which = make(case), case["pass"]
    grads = torch.randn_like(i.x), torch.randn_like(i.x)
    plain = (i.branch, i.x, i.norm_weight)
    makers: dict[str, Callable[[], Run]] = {
        "effkern": lambda: passes(which, lambda: effkern_residual(i), i.tensors(), grads),
        "add+norm": lambda: passes(which, lambda: effkern_plain(i), plain, grads),
        "products": lambda: products(i, which),
        "torch.compile": lambda: passes(which, lambda: compiled(handwritten)(*i.tensors()), i.tensors(), grads),
        "eager": lambda: passes(which, lambda: eager_residual(i), i.tensors(), grads),
        "copy": lambda: copy(i, which),
    }
    return Prepared({name: makers[name]() for name in names}, held=num_bytes(*i.tensors(), *grads))


def check(case: Case) -> None:
    """Both outputs and all gradients of a few rows against eager in float64."""
    i = make({**case, "rows": min(case["rows"], CHECK_ROWS)})

    def results(function: Callable[[Inputs], tuple[Tensor, Tensor]], dtype: torch.dtype | None) -> list[Tensor]:
        part = Inputs(*(t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in i.tensors()))
        out = function(part)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(y.shape, generator=generator).to(i.x.device, i.x.dtype).to(y.dtype) for y in out]
        return [*out, *torch.autograd.grad(out, part.tensors(), grads)]

    hold(zip(results(effkern_residual, None), results(eager_residual, torch.float64)), bound_of(case["dtype"]))


def work(case: Case) -> Work:
    rows, dim, rank, which = case["rows"], case["dim"], case["rank"], case["pass"]
    # A, B and w are read; backward reads A and B again and writes the gradients of all three.
    small = (2 * dim * rank + dim) * (1 if which == "forward" else 3)
    moved = (MOVES[which] * rows * dim + small) * item_bytes(case["dtype"])
    return Work(moved, PRODUCTS[which] * 2 * rows * dim * rank, case["dtype"])


def works(case: Case) -> dict[str, Work | None]:
    w = work(case)
    rows, dim, backward = case["rows"], case["dim"], case["pass"] == "both"
    # The plain residual's two gradients are one: forward f, x, y, z, backward those of y and z, y and the gradient.
    # Of its weights it has w alone.
    plain = ((8 if backward else 4) * rows + (3 if backward else 1)) * dim * item_bytes(case["dtype"])
    return {"copy": Work(w.bytes), "add+norm": Work(plain), "products": Work(0.0, w.flops, w.dtype)}


def why(case: Case) -> list[str]:
    return [f"{MOVES[case['pass']]} moves of N D elements and {PRODUCTS[case['pass']]} products of 2 N D r FLOPs"]


def huge() -> Huge:
    """More than 2^31 elements in each tensor; the last rows must be what they are alone."""
    rows, dim = (1 << 31) // 4096 + 8, 4096

    def run() -> None:
        small = make({"rows": 8, "dim": dim, "rank": 8, "dtype": "bfloat16", "device": "cpu"})
        tail, x = small.branch.detach(), small.x.detach()
        with torch.no_grad():
            parts = (t.expand(rows // 8, *t.shape).reshape(rows, dim) for t in (tail, x))
            out = effkern_residual(Inputs(*parts, *(t.detach() for t in small.tensors()[2:])))
            want = effkern_residual(small)
        if not all(torch.equal(a[-8:], b) for a, b in zip(out, want)):
            raise WrongResult("wrong result in the last rows")

    return Huge(4 * rows * dim * 2, f"forward, {rows} x {dim}, bfloat16", run)


OP = Op(
    name="laurel",
    doc=__doc__,
    axes=(
        Axis("rows", "--rows", (1, 512, 8192)),
        Axis("dim", "--dims", (768, 2048)),
        Axis("rank", "--ranks", (16, 32, 64)),
        Axis("dtype", "--dtypes", ("float32", "bfloat16"), ("float32", "bfloat16")),
        Axis("pass", "--pass", PASSES, PASSES),
    ),
    variants=("effkern", "add+norm", "products", "torch.compile", "eager", "copy"),
    check=check,
    prepare=prepare,
    work=work,
    works=works,
    floor={"add+norm": 1.0, "products": 1.0},
    registry=("laurel_residual",),
    why=why,
    rotates=True,
    scaling=(
        Scaling("rows", (256, 512, 1024, 2048, 4096), {"dim": 768, "rank": 32, "dtype": "float32", "pass": "both"},
                "1: every row costs the same"),
        Scaling("rank", (8, 16, 32, 64, 128), {"rows": 1024, "dim": 768, "dtype": "float32", "pass": "both"},
                "from 0 (memory) towards 1 (products)"),
    ),
    huge=huge,
)  # fmt: skip

if __name__ == "__main__":
    harness.main(OP)
