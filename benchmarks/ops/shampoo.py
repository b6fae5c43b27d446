"""Shampoo's operations on a decoder's matrices beside their floor, torch.linalg.eigh and torch's Muon.

    python -m benchmarks.ops.shampoo                    6 layers of width 384, 2 threads
    python -m benchmarks.ops.shampoo --json             one JSON object per line

Parameters: 4 x 384x384, 384x1536 and 1536x384 per layer, one-sided on the side of 384, so that 36 roots are one batch.
Floor: the Gram products at half the time of torch.bmm (one triangle is half the work), LAPACK's float32 eigh with a
half product, one whole matrix per thread, and the bare torch.bmm of root and gradient. "step" is Gram matrices, roots
and updates with momentum and norm; "step, roots / 10" has a tenth of the roots' time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from effkern.ops.shampoo import apply_, gram_ema_, inverse_root

DECAY = 0.95
GROUPS = (("left", 4, 1, 1), ("left", 1, 1, 4), ("right", 1, 4, 1))
# LAPACK in float32 is asked for down to here.
SINGLE_RIDGE = 1e-5


class Decoder:
    """Gradients, momenta and weights by shape; factors and roots in one batch."""

    def __init__(self, layers: int, width: int, steps: int) -> None:
        torch.manual_seed(0)
        self.groups = [(side, layers * n, width * m, width * k) for side, n, m, k in GROUPS]
        count = sum(n for _, n, _, _ in self.groups)
        self.factors = torch.zeros(count, width, width)
        self.roots = torch.zeros_like(self.factors)
        self.scales = torch.logspace(0, -2.6, width)
        self.rotations = torch.linalg.qr(torch.randn(count, width, width)).Q
        self.grads: list[Tensor] = []
        for _ in range(steps):
            self.grads = self._gradients()
            self.grams()
        self.weights = [torch.randn_like(g) for g in self.grads]
        self.momenta = [torch.zeros_like(g) for g in self.grads]
        self.products = [torch.empty_like(g) for g in self.grads]
        self.squares = [torch.empty(n, width, width) for _, n, _, _ in self.groups]

    def parts(self, batch: Tensor) -> list[Tensor]:
        return list(batch.split([n for _, n, _, _ in self.groups]))

    def _gradients(self) -> list[Tensor]:
        """Of the spectrum of a moving average of low rank plus noise, in a basis of each matrix's own."""
        found = []
        for (side, n, m, k), Q in zip(self.groups, self.parts(self.rotations)):
            other = k if side == "left" else m
            G = Q @ (self.scales[:, None] * torch.randn(n, Q.shape[1], other))
            found.append(G if side == "left" else G.mT.contiguous())
        return found

    def grams(self) -> None:
        for (side, *_), factor, grads in zip(self.groups, self.parts(self.factors), self.grads):
            gram_ema_(factor, grads, side=side, decay=DECAY, weight=1 - DECAY)

    def root(self, method: str, ridge: float) -> None:
        inverse_root(self.factors, method=method, ridge=ridge, out=self.roots)

    def updates(self) -> None:
        for i, ((side, *_), roots) in enumerate(zip(self.groups, self.parts(self.roots))):
            left, right = (roots, None) if side == "left" else (None, roots)
            apply_(
                self.weights[i], self.grads[i], left, right, lr=1e-3, momenta=self.momenta[i], momentum_decay=0.9,
                momentum_weight=0.1, weight_decay=0.1, norm=1.0,
            )  # fmt: skip

    def bare_grams(self) -> None:
        for (side, *_), grads, out in zip(self.groups, self.grads, self.squares):
            G = grads if side == "left" else grads.mT
            torch.bmm(G, G.mT, out=out)

    def bare_updates(self) -> None:
        for (side, *_), roots, grads, out in zip(self.groups, self.parts(self.roots), self.grads, self.products):
            torch.bmm(*((roots, grads) if side == "left" else (grads, roots)), out=out)

    def torch_roots(self) -> None:
        lam, Q = torch.linalg.eigh(self.factors)
        f = (lam.clamp_min(0.0) + SINGLE_RIDGE * lam[:, -1:]) ** -0.5
        torch.bmm(Q * f[:, None], Q.mT, out=self.roots)


def muon(decoder: Decoder) -> Callable[[], object]:
    """torch.optim.Muon on the same matrices, one parameter each."""
    parameters = [torch.nn.Parameter(w.clone()) for group in decoder.weights for w in group]
    for p, g in zip(parameters, (g for group in decoder.grads for g in group)):
        p.grad = g
    return torch.optim.Muon(parameters, lr=1e-3).step


def check(decoder: Decoder, ridge: float) -> None:
    """No number on a wrong result: the first roots against float64."""
    decoder.root("rational", ridge)
    A = decoder.factors[::12].double()
    lam, Q = torch.linalg.eigh(A)
    want = (Q * ((lam + ridge * lam[:, -1:]) ** -0.5)[:, None]) @ Q.mT
    error = ((decoder.roots[::12].double() - want).norm() / want.norm()).item()
    if not error <= 1e-2:
        raise SystemExit(f"wrong result: relative error {error:.1e} > 1e-2; nothing is timed")


def measure(decoder: Decoder, ridge: float, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each part, round after round."""
    parts: dict[str, Callable[[], object]] = {
        "bmm G G^T": decoder.bare_grams,
        "bmm X G": decoder.bare_updates,
        "eigh, a matrix per thread": lambda: decoder.root("eigh", SINGLE_RIDGE),
        "effkern gram": decoder.grams,
        "effkern root": lambda: decoder.root("rational", ridge),
        "effkern apply": decoder.updates,
        "torch.linalg.eigh": decoder.torch_roots,
        "torch.optim.Muon": muon(decoder),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in parts}
    for i in range(rounds + 1):
        for name, run in parts.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if i > 0:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def rows(found: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Medians, and the median over rounds of each ratio to the floor of its own round."""
    t = {name: list(pairs) for name, pairs in found.items()}

    def add(*terms: tuple[float, str]) -> list[tuple[float, float]]:
        count = len(t["bmm X G"])
        return [(sum(w * t[n][i][0] for w, n in terms), sum(w * t[n][i][1] for w, n in terms)) for i in range(count)]

    floors = {
        "gram": add((0.5, "bmm G G^T")),
        "root": add((1.0, "eigh, a matrix per thread")),
        "apply": add((1.0, "bmm X G")),
    }
    for label, share in (("step", 1.0), ("step, roots / 10", 0.1)):
        floors[label] = add((0.5, "bmm G G^T"), (share, "eigh, a matrix per thread"), (1.0, "bmm X G"))
    compared = [
        ("effkern gram", "gram", [(1.0, "effkern gram")]),
        ("effkern root", "root", [(1.0, "effkern root")]),
        ("torch.linalg.eigh and products", "root", [(1.0, "torch.linalg.eigh")]),
        ("effkern apply", "apply", [(1.0, "effkern apply")]),
        ("effkern step", "step", [(1.0, "effkern gram"), (1.0, "effkern root"), (1.0, "effkern apply")]),
        ("effkern step with eigh", "step",
         [(1.0, "effkern gram"), (1.0, "eigh, a matrix per thread"), (1.0, "effkern apply")]),
        ("torch one-sided step", "step", [(1.0, "bmm G G^T"), (1.0, "torch.linalg.eigh"), (1.0, "bmm X G")]),
        ("torch.optim.Muon", "step", [(1.0, "torch.optim.Muon")]),
        ("effkern step, roots / 10", "step, roots / 10",
         [(1.0, "effkern gram"), (0.1, "effkern root"), (1.0, "effkern apply")]),
    ]  # fmt: skip
    result = {}
    for name, floor, terms in compared:
        own, base = add(*terms), floors[floor]
        wall = [w for w, _ in own]
        result[name] = {
            "wall": statistics.median(wall),
            "wall_low": min(wall),
            "wall_high": max(wall),
            "cpu": statistics.median(c for _, c in own),
            "floor_ms": 1e3 * statistics.median(w for w, _ in base),
            "floor_cpu_ms": 1e3 * statistics.median(c for _, c in base),
            "of_floor": statistics.median(a[0] / b[0] for a, b in zip(own, base)),
            "of_floor_cpu": statistics.median(a[1] / b[1] for a, b in zip(own, base)),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--ridge", type=float, default=1e-6)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    decoder = Decoder(a.layers, a.width, steps=12)
    check(decoder, a.ridge)
    found = rows(measure(decoder, a.ridge, a.rounds))
    case: dict[str, Any] = {"layers": a.layers, "width": a.width, "ridge": a.ridge}
    if a.json:
        for name, row in found.items():
            print(json.dumps({"benchmark": "shampoo", "case": case, "variant": name, **row, **runner.machine()}))
        return
    print(json.dumps(runner.machine()))
    print("| what | wall ms | cpu ms | floor ms | of floor | of floor, cpu |", "|---|---|---|---|---|---|", sep="\n")
    for name, r in found.items():
        print(
            f"| {name} | {1e3 * r['wall']:.1f} | {1e3 * r['cpu']:.1f} | {r['floor_ms']:.1f} | {r['of_floor']:.2f} "
            f"| {r['of_floor_cpu']:.2f} |"
        )


if __name__ == "__main__":
    main()
