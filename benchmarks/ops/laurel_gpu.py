"""laurel_residual beside eager, torch.compile and a plain residual with its norm: forward, and forward with backward.

    python -m benchmarks.ops.laurel_gpu [--variant rw_lr] [--rows 16384] [--dim 2048] [--rank 64] [--check-all]

The floor is laurel_residual without weights and low-rank map, a fused add + RMSNorm: it moves the same bytes.
--check-all compares every variant with float64 first, on a few rows; otherwise only the one that is timed.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from benchmarks.case import Work
from effkern.ops.laurel import laurel_residual

CHECK_ROWS = 70
# x, f, y, z, their gradients and what the products read, in N D elements: forward, forward with backward.
MOVES = {"forward": 4, "both": 12}
VARIANTS = ("plain", "rw", "rw_channel", "lr", "rw_lr", "rw_lr_pa", "gemma", "pa")
Arguments = dict[str, Any]


def make(variant: str, rows: int, dim: int, rank: int, dtype: torch.dtype, device: str) -> Arguments:
    """Arguments of laurel_residual; all tensors take gradients."""
    torch.manual_seed(0)

    def random(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(of).requires_grad_()

    given: Arguments = {"branch": random(rows, dim), "x": random(rows, dim), "norm_weight": random(dim)}
    if variant.startswith("rw"):
        given["weights"] = random(2, *([dim] if variant == "rw_channel" else []), scale=0.3, of=torch.float32)
    if "lr" in variant or variant == "gemma":
        past = 2 * rank if variant.endswith("pa") else 0
        given["down"] = random(dim, rank + past, scale=dim**-0.5)
        given["up"] = random(rank + past, dim, scale=rank**-0.5)
        if past:
            given["past"] = random(rows, past)
    if variant == "gemma":
        given |= {"low_rank_norm": random(dim), "addends": [random(rows, dim)], "scale": 2**-0.5}
    if variant == "pa":
        given["addends"] = [random(rows, dim) for _ in range(2)]
        given["addend_weights"] = random(2, of=torch.float32)
    return given


def leaves(given: Arguments) -> list[Tensor]:
    return [t for v in given.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]


def textbook(given: Arguments) -> tuple[Tensor, ...]:
    """As one writes it by hand, in the inputs' own type; without weights alpha = beta = 1."""
    x, h, weights = given["x"], given["x"], given.get("weights")
    results: tuple[Tensor, ...] = ()
    if "up" in given:
        u, past = x @ given["down"], given.get("past")
        rank = given["up"].shape[0] - (0 if past is None else past.shape[1])
        low = (u[:, :rank] if past is None else torch.cat([u[:, :rank], past], 1)) @ given["up"]
        if "low_rank_norm" in given:
            low = torch.nn.functional.rms_norm(low, low.shape[-1:], given["low_rank_norm"], 1e-6)
        h = x + low
        results = (u[:, rank:],) if u.shape[1] > rank else ()
    alpha, beta = (1.0, 1.0) if weights is None else (2.0 * weights.softmax(0)).to(x.dtype)
    y = alpha * given["branch"] + beta * h
    c = given.get("addend_weights")
    for j, e in enumerate(given.get("addends", [])):
        y = y + (e if c is None else c[j].to(x.dtype) * e)
    y = given.get("scale", 1.0) * y
    return (y, torch.nn.functional.rms_norm(y, y.shape[-1:], given["norm_weight"], 1e-6), *results)


def ours(given: Arguments, impl: str = "auto") -> tuple[Tensor, ...]:
    return tuple(t for t in laurel_residual(**given, impl=impl) if t is not None)


def check(variant: str, dim: int, rank: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest relative error of results and gradients against float64; no number on a wrong result."""
    given = make(variant, CHECK_ROWS, dim, rank, dtype, device)
    exact = {
        k: [e.detach().double().requires_grad_() for e in v] if isinstance(v, list)
        else v.detach().double().requires_grad_() if isinstance(v, Tensor) else v
        for k, v in given.items()
    }  # fmt: skip

    def all_of(results: tuple[Tensor, ...], arguments: Arguments) -> list[Tensor]:
        grads = torch.autograd.grad(results, leaves(arguments), [torch.ones_like(t) for t in results])
        return [*results, *grads]

    def errors(found: list[Tensor]) -> float:
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth))

    truth = all_of(ours(exact, "reference"), exact)
    found = {"effkern": errors(all_of(ours(given), given)), "eager": errors(all_of(textbook(given), given))}
    if not found["effkern"] <= max(2.0 * found["eager"], 1e-5):
        raise SystemExit(f"{variant}: wrong result, nothing is timed: {found}")
    return found


def variants(given: Arguments, backward: bool) -> dict[str, Callable[[], object]]:
    compiled = torch.compile(textbook)
    plain = {k: given[k] for k in ("branch", "x", "norm_weight")}

    def timed(run: Callable[[Arguments], tuple[Tensor, ...]], arguments: Arguments) -> Callable[[], object]:
        if not backward:
            return lambda: run({k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()})
        grads = [torch.ones_like(t) for t in run(arguments)]
        return lambda: torch.autograd.grad(run(arguments), leaves(arguments), grads)

    return {
        "add+norm": timed(ours, plain),
        "effkern": timed(ours, given),
        "torch.compile": timed(compiled, given),
        "eager": timed(textbook, given),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, default="rw_lr")
    parser.add_argument("--rows", type=int, default=16384 if torch.cuda.is_available() else 512)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check-all", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        raise runner.Skip("--device must be one that is there, got 'cuda', and torch sees none")
    if a.device == "cpu":
        torch.set_num_threads(a.threads)
    dtype = getattr(torch, a.dtype)
    for variant in VARIANTS if a.check_all else (a.variant,):
        print(f"# {variant}: {check(variant, a.dim, a.rank, dtype, a.device)}")
    given = make(a.variant, a.rows, a.dim, a.rank, dtype, a.device)
    for what, moves in MOVES.items():
        timings = runner.interleave(variants(given, what == "both"), a.rounds)
        case = {k: getattr(a, k) for k in ("variant", "rows", "dim", "rank", "dtype", "device")} | {"pass": what}
        # With a norm and without addends; A, B and, backward, their gradients are read or written once.
        small = sum(given[k].numel() for k in ("down", "up") if k in given) * (1 if what == "forward" else 3)
        flops = (2 if what == "forward" else 6) * 2 * a.rows * given["down"].numel() if "down" in given else 0
        work = Work((moves * given["x"].numel() + small) * dtype.itemsize, flops, a.dtype)
        extra = {n: (Work(work.bytes) if n == "add+norm" else work).rates(t.wall) for n, t in timings.items()}
        if a.json:
            print("\n".join(runner.result_lines("laurel", case, timings, extra)))
        else:
            print(json.dumps({**case, **runner.machine()}))
            print(runner.table(timings, "add+norm", extra))


if __name__ == "__main__":
    runner.told(main)
