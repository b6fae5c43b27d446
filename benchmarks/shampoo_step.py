"""A whole optimizer step of a small decoder: Shampoo beside AdamW, Muon, a plain one-sided Shampoo, and its floor.

    python -m benchmarks.shampoo_step [--rounds 7] [--json] [--out FILE.json]

Parameters: per layer four width x width, one width x 4 width, one 4 width x width; an embedding, which every method
gives to fused AdamW. Gradients are random and do not change. All variants run in turn; medians.

Floor: the parts of a one-sided Shampoo by eigendecompositions, each alone in bare calls: the Gram products at half the
time of torch.mm (one triangle is half the work), LAPACK's float32 eigh with Q f(lambda) Q^T, one whole matrix per core
(the op's method "eigh"), and the products of roots and momenta (torch.mm into memory that exists); plus fused AdamW of
the embedding. `floor / 10`: the same with a tenth of the eigh. `peak`: what a step takes beside its state, in its own
process.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor, nn

from effkern.ops import shampoo as ops
from effkern.optim import OneSidedShampoo, Shampoo

CHECK_RIDGE = 1e-6
Step = Callable[[], object]


def parameters(a: argparse.Namespace) -> tuple[list[nn.Parameter], nn.Parameter]:
    """Matrices and embedding, with gradients of low rank plus noise, as those of a model are."""
    generator = torch.Generator().manual_seed(0)
    d = a.width
    shapes = [(d, d)] * 4 + [(d, 4 * d), (4 * d, d)]

    def make(m: int, n: int) -> nn.Parameter:
        p = nn.Parameter(0.02 * torch.randn(m, n, generator=generator))
        low = torch.randn(m, 32, generator=generator) @ torch.randn(32, n, generator=generator)
        p.grad = 1e-3 * (low + torch.randn(m, n, generator=generator))
        return p

    return [make(*shape) for _ in range(a.layers) for shape in shapes], make(a.vocabulary, d)


def sides(matrices: list[nn.Parameter]) -> list[bool]:
    """Left where rows are not more than columns."""
    return [p.shape[0] <= p.shape[1] for p in matrices]


def ours(a: argparse.Namespace, cls: type[Shampoo] = OneSidedShampoo, **options: Any) -> tuple[Step, Shampoo]:
    matrices, table = parameters(a)
    groups = [{"params": matrices, "rule": "shampoo"}, {"params": [table], "rule": "adamw"}]
    optimizer = cls(groups, lr=1e-4, **options)
    return optimizer.step, optimizer


def many(optimizers: list[torch.optim.Optimizer]) -> Step:
    def run() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return run


class Plain(torch.optim.Optimizer):
    """One-sided Shampoo as one would write it: batched torch.linalg.eigh, matrix by matrix for the rest."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1e-4})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = self.param_groups[0]["params"]
        for p in params:
            state = self.state[p]
            if not state:
                state["m"], state["l"] = torch.zeros_like(p), torch.zeros(min(p.shape), min(p.shape))
            g = p.grad
            state["m"].lerp_(g, 0.1)
            state["l"].lerp_(g @ g.T if p.shape[0] <= p.shape[1] else g.T @ g, 0.05)
        values, vectors = torch.linalg.eigh(torch.stack([self.state[p]["l"] for p in params]))
        damped = (values.clamp_min(0) + 1e-6 * values[:, -1:]) ** -0.5
        roots = (vectors * damped[:, None, :]) @ vectors.mT
        for p, root in zip(params, roots):
            m = self.state[p]["m"]
            u = root @ m if p.shape[0] <= p.shape[1] else m @ root
            p.add_(u, alpha=-1e-4 * 0.2 * p.numel() ** 0.5 / u.norm().item())


def variants(a: argparse.Namespace) -> tuple[dict[str, Step], dict[str, dict[str, float]]]:
    runs: dict[str, Step] = {}
    extra: dict[str, dict[str, float]] = {}

    def add(name: str, run: Step, optimizers: list[torch.optim.Optimizer]) -> None:
        run()
        runs[name] = run
        held = sum(v.numel() * v.element_size() for o in optimizers for s in o.state.values() for v in s.values())
        extra[name] = {"state_mib": held / 2**20}

    for name, fused in (("AdamW foreach", False), ("AdamW fused", True)):
        matrices, table = parameters(a)
        adamw = torch.optim.AdamW([*matrices, table], lr=1e-4, foreach=not fused, fused=fused)
        add(name, adamw.step, [adamw])
    for name in ("torch Muon", "plain, batched torch.linalg.eigh"):
        matrices, table = parameters(a)
        first = torch.optim.Muon(matrices, lr=1e-4) if name == "torch Muon" else Plain(matrices)
        rest = torch.optim.AdamW([table], lr=1e-4, fused=True)
        add(name, many([first, rest]), [first, rest])
    cases: dict[str, dict[str, Any]] = {
        "ours, roots every step": {},
        "ours, roots every step, eigh": {"root_method": "eigh"},
        "ours, roots every 10 steps": {"precondition_frequency": 10},
    }
    for name, options in cases.items():
        run, optimizer = ours(a, **options)
        add(name, ten(run) if "10" in name else run, [optimizer])
    run, optimizer = ours(a, Shampoo, side="both")
    add("ours, two-sided, roots every step", run, [optimizer])
    return runs, extra


def ten(run: Step) -> Step:
    """Ten steps, of which one takes roots; the time is divided by ten afterwards."""

    def repeat() -> None:
        for _ in range(10):
            run()

    return repeat


def floor_parts(a: argparse.Namespace) -> dict[str, Step]:
    matrices, table = parameters(a)
    left = sides(matrices)
    d = a.width
    groups: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
    for i, p in enumerate(matrices):
        groups.setdefault((left[i], tuple(p.shape)), []).append(i)
    order = [i for members in groups.values() for i in members]
    factors = torch.zeros(len(matrices), d, d)

    def gram() -> None:
        for factor, i in zip(factors, order):
            g = matrices[i].grad
            assert g is not None
            torch.mm(*((g, g.T) if left[i] else (g.T, g)), out=factor)

    gram()
    roots = torch.empty_like(factors)

    def eigh() -> None:
        # From this ridge on the op's eigh is LAPACK's in float32; below it, float64.
        ops.inverse_root(factors, method="eigh", ridge=1e-5, out=roots)

    eigh()
    momenta = [matrices[i].detach().clone() for i in order]
    outs: list[Tensor] = [torch.empty_like(m) for m in momenta]

    def products() -> None:
        for k, i in enumerate(order):
            if left[i]:
                torch.mm(roots[k], momenta[k], out=outs[k])
            else:
                torch.mm(momenta[k], roots[k], out=outs[k])

    adamw = torch.optim.AdamW([table], lr=1e-4, fused=True)
    return {"floor: Gram": gram, "floor: eigh": eigh, "floor: products": products, "floor: embedding": adamw.step}


def check(a: argparse.Namespace) -> None:
    """No number on a wrong result: the first step's direction against float64.

    The factors are then those of one gradient U diag(s) V: with ridge r it becomes U diag(s (s^2 + r s_1^2)^(-1/2)) V.
    """
    small = argparse.Namespace(**{**vars(a), "width": 48, "layers": 1, "vocabulary": 8})
    cases: list[tuple[type[Shampoo], dict[str, Any]]] = [(OneSidedShampoo, {}), (Shampoo, {"side": "both"})]
    for cls, options in cases:
        run, optimizer = ours(small, cls, weight_decay=0.0, ridge=CHECK_RIDGE, **options)
        before = [p.detach().double() for p in optimizer.param_groups[0]["params"]]
        run()
        for p, was in zip(optimizer.param_groups[0]["params"], before):
            U, s, V = torch.linalg.svd(p.grad.double(), full_matrices=False)
            want = (U * (s * (s**2 + CHECK_RIDGE * s[0] ** 2) ** -0.5)) @ V
            moved = (was - p.detach().double()).flatten()
            error = 1 - torch.nn.functional.cosine_similarity(moved, want.flatten(), dim=0).item()
            if not error <= 1e-5:
                raise SystemExit(f"wrong result of {cls.__name__}: 1 - cosine {error:.1e} > 1e-5; nothing is timed")


def measure(a: argparse.Namespace) -> tuple[dict[str, runner.Timing], dict[str, dict[str, float]]]:
    runs, extra = variants(a)
    timings = runner.interleave({**runs, **floor_parts(a)}, a.rounds, warmup=1)
    name = "ours, roots every 10 steps"
    timings[name] = scaled(timings[name], 0.1)
    parts = {n: timings.pop(n) for n in list(timings) if n.startswith("floor")}
    # One triangle is half of the product.
    parts["floor: Gram"] = scaled(parts["floor: Gram"], 0.5)
    timings["floor"] = added(list(parts.values()))
    fewer = [scaled(t, 0.1) if n == "floor: eigh" else t for n, t in parts.items()]
    timings["floor / 10"] = added(fewer)
    timings |= parts
    return timings, extra


def scaled(t: runner.Timing, by: float) -> runner.Timing:
    return runner.Timing(t.wall * by, t.wall_low * by, t.wall_high * by, t.cpu * by)


def added(parts: list[runner.Timing]) -> runner.Timing:
    return runner.Timing(*(sum(getattr(t, f) for t in parts) for f in ("wall", "wall_low", "wall_high", "cpu")))


def peak(a: argparse.Namespace) -> dict[str, float]:
    """MiB that one step takes beside weights, gradients and state, each in a process of its own."""
    found = {}
    for name in ("ours", "muon"):
        sizes = ("width", "layers", "vocabulary", "threads")
        arguments = [f"--peak={name}", *(f"--{size}={getattr(a, size)}" for size in sizes)]
        found[name] = int(runner.in_fresh_process("benchmarks.shampoo_step", *arguments)) / 2**20
    return {"ours, roots every step": found["ours"], "torch Muon": found["muon"]}


def prepared(a: argparse.Namespace) -> Step:
    if a.peak == "ours":
        return ours(a)[0]
    matrices, table = parameters(a)
    return many([torch.optim.Muon(matrices, lr=1e-4), torch.optim.AdamW([table], lr=1e-4, fused=True)])


def table(timings: dict[str, runner.Timing], extra: dict[str, dict[str, float]]) -> str:
    lines = [
        "| variant | ms | low | high | CPU ms | x floor | CPU x | state MiB | peak MiB |", "|---" * 9 + "|"
    ]  # fmt: skip
    for name, t in timings.items():
        base = timings["floor / 10" if "10" in name else "floor"]
        more = extra.get(name, {})
        cells = [f"{more[k]:.1f}" if k in more else "" for k in ("state_mib", "peak_mib")]
        lines.append(
            f"| {name} | {t.wall * 1e3:.1f} | {t.wall_low * 1e3:.1f} | {t.wall_high * 1e3:.1f} | {t.cpu * 1e3:.1f} | "
            f"{t.wall / base.wall:.2f} | {t.cpu / base.cpu:.2f} | {cells[0]} | {cells[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=["ours", "muon"], help="print the bytes of one step, and stop")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--out", type=Path, help="also write the lines to a file")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.peak:
        print(runner.peak_memory(lambda: prepared(a)))
        return
    runner.keep_memory()
    check(a)
    timings, extra = measure(a)
    for name, value in peak(a).items():
        extra[name]["peak_mib"] = value
    case = {"width": a.width, "layers": a.layers, "vocabulary": a.vocabulary}
    lines = runner.result_lines("shampoo_step", case, timings, extra)
    print("\n".join(lines) if a.json else table(timings, extra))
    if a.out:
        a.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
