"""LoopedBlock's execution modes: peak memory against its formulas, time against full storage and a hand-written loop,
and the error of a shared gradient in bfloat16.

    python -m benchmarks.looped_modes [--parts memory time overhead gradient] [--out FILE.json]

The core is k pre-norm layers (causal attention, GLU with F = 8 D / 3) in float32. Memory is the rise of the process at
its peak over one forward and backward pass, each case in a process of its own. S is a state; `one pass` is k layers
once, by torch alone, with the graph and the workspace of their backward: the k M of the formulas as it really is. M is
the slope of that in k.

    recompute        L S + one pass                        full         one pass + (L - 1) k M
    recompute_layer  L S + k S + one pass of one layer     truncated t  t S + one pass

Float32 gradients of the core's parameters, P, come on top: many tokens make them small.

Times are medians over rounds in which the variants take turns, and process CPU time, which other work on the machine
moves less. `by hand` is `for _ in range(L): h = core(h + x)`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn import LoopedBlock, Truncated

HEADS = 8
TRUNCATED = 2
MODES = ("full", "recompute", "recompute_layer", f"truncated {TRUNCATED}")


class Layer(nn.Module):
    """x + attention(norm(x)), then x + glu(norm(x))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 8 * dim // 3
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        with torch.no_grad():
            for end in (self.out, self.down):
                end.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        heads = self.qkv(self.norms[0](x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def layers(count: int, dim: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Layer(dim) for _ in range(count)]


def mode_of(name: str) -> Any:
    return Truncated(TRUNCATED) if name.startswith("truncated") else name


def passes(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Forward and backward, as after zero_grad()."""

    def run() -> None:
        module.zero_grad()
        x.grad = None
        call(x).backward(x.detach())

    return run


def inputs(a: argparse.Namespace) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(a.batch, a.length, a.dim, requires_grad=True)


def measure_memory(a: argparse.Namespace, case: str, loops: int, count: int) -> float:
    """States of one case, in a process of its own."""
    sizes = [f"--{name}={getattr(a, name)}" for name in ("dim", "batch", "length", "threads")]
    which = [f"--case={case}", f"--case-loops={loops}", f"--case-layers={count}"]
    line = runner.in_fresh_process("benchmarks.looped_modes", *sizes, *which)
    return float(line) / (a.batch * a.length * a.dim * 4)


def memory_case(a: argparse.Namespace) -> None:
    x, stack = inputs(a), layers(a.case_layers, a.dim)
    once = nn.Sequential(*stack)
    block = LoopedBlock(stack, a.case_loops)

    def prepare() -> Callable[[], object]:
        if a.case == "one pass":
            return passes(once, once, x)
        return passes(block, lambda x: block(x, mode=mode_of(a.case)), x)

    print(runner.peak_memory(prepare))


def memory(a: argparse.Namespace) -> list[dict[str, Any]]:
    records = []
    for count in a.layers:
        once, single = (measure_memory(a, "one pass", 1, n) for n in (count, 1))
        own = sum(p.numel() for layer in layers(count, a.dim) for p in layer.parameters())
        sums = own / (a.batch * a.length * a.dim)
        per_layer = once / count if count == 1 else (once - single) / (count - 1)
        for loops in a.loops:
            for name in a.modes:
                formula = {
                    "full": once + (loops - 1) * count * per_layer,
                    "recompute": loops + once,
                    "recompute_layer": loops + count + single,
                }.get(name, TRUNCATED + once)
                found = measure_memory(a, name, loops, count)
                records.append(
                    {
                        "part": "memory", "layers": count, "loops": loops, "mode": name, "states": found,
                        "formula": formula, "one_pass": once, "per_layer": per_layer, "sums": sums,
                    }
                )  # fmt: skip
                print(f"k={count} L={loops:<3} {name:<16} {found:8.1f} S   formula {formula:8.1f} S   "
                      f"{found / formula:.3f}   (M = {per_layer:.1f} S, P = {sums:.1f} S)", flush=True)  # fmt: skip
    return records


def times(a: argparse.Namespace) -> list[dict[str, Any]]:
    records = []
    for count in a.layers:
        for loops in a.loops:
            stack, x = layers(count, a.dim), inputs(a)
            block = LoopedBlock(stack, loops)
            variants = {
                name: passes(block, lambda x, name=name, block=block: block(x, mode=mode_of(name)), x)  # type: ignore[misc]
                for name in MODES
            }
            records += _timed(a, variants, "time", count, loops, "full")
    return records


def overhead(a: argparse.Namespace) -> list[dict[str, Any]]:
    """The block, with an injection, against the loop as one writes it."""
    records = []
    for count in a.layers:
        for loops in a.loops:
            stack, x = layers(count, a.dim), inputs(a)
            core = nn.Sequential(*stack)
            block = LoopedBlock(core, loops, injection="add")

            def by_hand(x: Tensor, core: nn.Module = core, loops: int = loops) -> Tensor:
                h = x
                for _ in range(loops):
                    h = core(h + x)
                return h

            variants = {"by hand": passes(core, by_hand, x)}
            for name in ("full", "autograd"):
                variants[name] = passes(block, lambda x, name=name, block=block: block(x, mode=name), x)  # type: ignore[misc]
            records += _timed(a, variants, "overhead", count, loops, "by hand")
    return records


def _timed(
    a: argparse.Namespace, variants: dict[str, Callable[[], None]], part: str, count: int, loops: int, floor: str
) -> list[dict[str, Any]]:  # fmt: skip
    timings = runner.interleave(variants, a.rounds)
    base, records = timings[floor], []
    for name, t in timings.items():
        records.append({"part": part, "layers": count, "loops": loops, "variant": name, "wall": t.wall, "cpu": t.cpu,
                        "wall_low": t.wall_low, "floor": floor})  # fmt: skip
        print(f"k={count} L={loops:<3} {name:<16} {t.wall * 1e3:9.1f} ms  cpu {t.cpu * 1e3:9.1f} ms   x {floor}: "
              f"wall {t.wall / base.wall:.3f}  low {t.wall_low / base.wall_low:.3f}  cpu {t.cpu / base.cpu:.3f}",
              flush=True)  # fmt: skip
    return records


def gradient(a: argparse.Namespace) -> list[dict[str, Any]]:
    """One product W, visited L times, h + (silu(h) W^T) / L in bfloat16; truth: the same visits' addends in float64."""
    records, dim, rows = [], 256, 1024
    for loops in (4, 8, 32):
        errors: dict[str, list[float]] = {"torch": [], "effkern": [], "float32 sums, kept": []}
        for seed in range(a.seeds):
            torch.manual_seed(seed)
            weight = nn.Parameter((torch.randn(dim, dim) * dim**-0.5).bfloat16())
            core = _Visit(weight, 1 / loops)
            x, grad = torch.randn(rows, dim).bfloat16(), torch.randn(rows, dim).bfloat16()
            block = LoopedBlock(core, loops)
            truth = _truth(core, [x, *block.all_states(x)][:-1], grad)
            for name, mode in (("torch", "autograd"), ("effkern", "recompute")):
                (found,) = torch.autograd.grad(block(x, mode=mode), weight, grad)
                errors[name].append(float((found.double() - truth).norm() / truth.norm()))
            kept = LoopedBlock(core, loops, main_grad=True)
            kept(x).backward(grad)
            errors["float32 sums, kept"].append(float((weight.main_grad.double() - truth).norm() / truth.norm()))  # type: ignore[attr-defined]  # fmt: skip
        for name, values in errors.items():
            mean = sum(values) / len(values)
            records.append({"part": "gradient", "loops": loops, "variant": name, "error": mean})
            print(f"L={loops:<3} {name:<20} {100 * mean:.2f} %", flush=True)
    return records


class _Visit(nn.Module):
    def __init__(self, weight: nn.Parameter, share: float) -> None:
        super().__init__()
        self.weight, self.share = weight, share

    def forward(self, h: Tensor) -> Tensor:
        return h + F.linear(F.silu(h), self.weight) * self.share


def _truth(core: _Visit, states: list[Tensor], grad: Tensor) -> Tensor:
    truth = torch.zeros_like(core.weight, dtype=torch.float64)
    for state in reversed(states):
        h = state.detach().requires_grad_()
        truth += (grad.double() * core.share).T @ F.silu(h.detach()).double()
        (grad,) = torch.autograd.grad(core(h), h, grad)
    return truth


PARTS = {"memory": memory, "time": times, "overhead": overhead, "gradient": gradient}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--loops", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the memory table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write records and machine as JSON")
    for name in ("--case", "--case-loops", "--case-layers"):
        parser.add_argument(name, type=str if name == "--case" else int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.case:
        memory_case(a)
        return
    records = []
    for part in a.parts:
        print(f"-- {part}", flush=True)
        records += PARTS[part](a)
    if a.out:
        case = {name: getattr(a, name) for name in ("dim", "batch", "length", "rounds", "seeds")}
        a.out.write_text(json.dumps({**case, **runner.machine(), "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
