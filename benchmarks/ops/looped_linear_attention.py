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
from collections.abc import Callable

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from effkern import looped_linear_attention
from effkern.ops.looped_linear_attention import reference
from effkern.ops.looped_linear_attention.problem import cheapest, products

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


def call(inputs: Inputs, function: Function, loops: int, backward: bool) -> Callable[[], object]:
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(*inputs, loops)

        return forward
    grad = torch.randn(inputs[0].shape[0])
    return lambda: torch.autograd.grad(function(*inputs, loops), inputs, grad)


def check(inputs: Inputs, loops: int) -> None:
    """No number on a wrong result: prediction and gradients against the paper's form in float64."""
    grad = torch.randn(inputs[0].shape[0])

    def results(function: Function, dtype: torch.dtype) -> list[Tensor]:
        x, y, query, a = part = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = function(x, y, query, a, loops)
        return [out, *torch.autograd.grad(out, part, grad.to(dtype))]

    for got, want in zip(results(effkern_op, torch.float32), results(paper, torch.float64)):
        error = ((got.double() - want).norm() / want.norm()).item()
        if not error < 1e-3:
            raise SystemExit(f"wrong result: relative error {error:.1e}; nothing is timed")


def multiply_adds(case: dict, backward: bool) -> int:
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


def peak_rate(rounds: int) -> float:
    """Multiply-adds per second of torch.mm."""
    a, b = torch.randn(2, 1024, 1024)
    out = torch.empty(1024, 1024)
    time = runner.interleave({"mm": lambda: torch.mm(a, b, out=out)}, rounds)["mm"]
    return 1024**3 / time.wall_low


def measure(case: dict, rounds: int, with_paper: bool, rate: float) -> list[str]:
    loops = case["loops"]
    inputs = make(case["batch"], case["examples"], case["dim"], loops, case["free"])
    check(inputs, loops)
    lines = []
    for backward in (False, True):
        torch._dynamo.reset()
        plain = {"loop": plain_loop, "moments": moments_loop}
        first = runner.interleave({k: call(inputs, f, loops, backward) for k, f in plain.items()}, 3, 1)
        faster = plain[min(first, key=lambda name: first[name].wall)]
        compiled = torch.compile(faster, dynamic=False)
        functions: dict[str, Function] = {"effkern": effkern_op, **plain, "compile": compiled}
        if with_paper:
            functions["paper"] = paper
        timings = runner.interleave({k: call(inputs, f, loops, backward) for k, f in functions.items()}, rounds)
        floor = multiply_adds(case, backward) / rate
        ours = timings["effkern"]
        which = {**case, "pass": "both" if backward else "forward"}
        extra = {
            name: {"x_effkern": t.wall / ours.wall, "floor_s": floor, "share_of_floor": floor / t.wall}
            for name, t in timings.items()
        }
        lines += runner.result_lines("looped_linear_attention", which, timings, extra)
        cells = [f"{name} {t.wall * 1e6:.0f} us ({t.wall / ours.wall:.1f} x)" for name, t in timings.items()]
        print(
            f"{which}: {', '.join(cells)}; floor {floor * 1e6:.0f} us, {floor / ours.wall:.2f} of it reached",
            flush=True,
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--dim", type=int, default=20)
    parser.add_argument("--loops", type=int, default=32)
    parser.add_argument("--free", action="store_true", help="a preconditioner per loop")
    parser.add_argument("--paper", action="store_true", help="also the paper's form")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="also print result lines")
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    rate = peak_rate(a.rounds)
    print(f"torch.mm: {rate / 1e9:.0f} G multiply-adds per second, {torch.get_num_threads()} threads")
    for batch in a.batches:
        case = {"batch": batch, "examples": a.examples, "dim": a.dim, "loops": a.loops, "free": a.free}
        lines = measure(case, a.rounds, a.paper, rate)
        if a.json:
            print("\n".join(lines))


if __name__ == "__main__":
    main()
