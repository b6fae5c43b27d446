"""In-context regression by linear attention: looped layers beside free ones, computed and trained.

    python -m benchmarks.papers.looped_in_context [--seeds 3] [--steps 2000] [--out FILE.json]

Computed: the scalar model of looped_spectra.py, exact optima of the rates a_l for eigenvalues log-uniform on [1,
kappa]; for a spectrum of L atoms, on which L free layers are exact, what becomes of the loss when the spectrum is
scaled afterwards; and whether the read-out after each layer falls, for free layers with the rates in increasing and in
decreasing order. Source: arXiv 2410.21698; of that paper only the abstract was available, so that the settings are
ours.

Trained: effkern.looped_linear_attention, A of [d, d] for all loops or [L, d, d], by Adam from A = 2 / (1 + kappa) and a
little noise, on tasks with eigenvectors and eigenvalues of their own, w ~ N(0, Sigma^-1), the loss (w . q -
prediction)^2 / d of a fresh query. The examples have covariance Sigma to the last digit, as if there were infinitely
many, as in the scalar model. "atoms" trains on d = L fixed eigenvalues and tests on scaled ones. Losses are means over
65536 test tasks. A trained net that has not converged is also less fragile than the computed optimum. A looped net may
end below the scalar model's: its A gets an antisymmetric part, whose complex rates no multiple of the unit matrix has.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import numpy as np
import torch
from torch import Tensor

from benchmarks.papers import looped_spectra as spectra
from effkern import looped_linear_attention

COMPUTED = [(10.0, 4), (10.0, 8), (10.0, 16), (100.0, 8), (100.0, 16), (100.0, 32)]
ATOMS = [8, 16]
SCALES = [1.0, 1.001, 1.03, 1.1]
TRAINED = [("log-uniform", 10.0, 4), ("log-uniform", 10.0, 8), ("log-uniform", 100.0, 8), ("atoms", 10.0, 8)]
TEST_TASKS = 65536


def computed() -> dict[str, Any]:
    """Both tables of the scalar model."""
    broad = []
    for kappa, loops in COMPUTED:
        spectrum = spectra.log_uniform(kappa)
        looped, free = spectra.best_looped(spectrum, loops), spectra.best_free(spectrum, loops)
        broad.append(
            {
                "kappa": kappa, "loops": loops, "looped": spectra.loss(spectrum, looped),
                "free": spectra.loss(spectrum, free), "rate": float(looped[0]),
                "looped_scaled_1.1": spectra.loss(spectrum, looped, 1.1),
                "free_scaled_1.1": spectra.loss(spectrum, free, 1.1),
                "looped_falls": spectra.falls(spectra.after_each(spectrum, looped)),
                "free_falls_increasing": spectra.falls(spectra.after_each(spectrum, free)),
                "free_falls_decreasing": spectra.falls(spectra.after_each(spectrum, free[::-1])),
                "free_worst_decreasing": max(spectra.after_each(spectrum, free[::-1])),
            }
        )  # fmt: skip
    fragile = []
    for loops in ATOMS:
        spectrum = spectra.atoms(loops, 10.0)
        looped, free = spectra.best_looped(spectrum, loops), 1 / spectrum.values
        for scale in SCALES:
            fragile.append(
                {
                    "loops": loops, "scale": scale, "looped": spectra.loss(spectrum, looped, scale),
                    "free": spectra.loss(spectrum, free, scale),
                }
            )  # fmt: skip
    return {"broad": broad, "atoms": fragile}


def tasks(
    spectrum: str, kappa: float, dim: int, batch: int, generator: torch.Generator, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, 2 d, d] with X^T X / n = Sigma, y, query and its target."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if spectrum == "atoms":
        values = torch.from_numpy(np.geomspace(1, kappa, dim)).float().expand(batch, dim)
    else:
        values = kappa ** torch.rand(batch, dim, generator=generator)
    # Any orthonormal columns will do for x, as the recurrence sees Sigma alone; those of Sigma are new in each task.
    vectors = torch.linalg.qr(normal(batch, dim, dim)).Q
    root = (scale * values).sqrt()[:, None]
    x = (2 * dim) ** 0.5 * torch.linalg.qr(normal(2 * dim, dim)).Q @ (root * vectors).transpose(1, 2)
    w = (vectors / root) @ normal(batch, dim, 1)
    query = ((root * vectors) @ normal(batch, dim, 1))[..., 0]
    return x, (x @ w)[..., 0], query, (query * w[..., 0]).sum(1)


def losses(matrices: Tensor, task: tuple[Tensor, Tensor, Tensor, Tensor], loops: int) -> Tensor:
    """After each loop, per unit of the target's own size: its mean square is d."""
    x, y, query, target = task
    per_loop = looped_linear_attention(x, y, query, matrices, loops, every_loop=True).per_loop
    assert per_loop is not None
    return (per_loop - target).square().mean(1) / x.shape[-1]


def train(a: argparse.Namespace, spectrum: str, kappa: float, loops: int, free: bool, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    dim = loops if spectrum == "atoms" else a.dim
    matrices = (2 / (1 + kappa) * torch.eye(dim)).repeat(*((loops,) if free else ()), 1, 1)
    # Equal layers have equal gradients where their order does not matter: they need something to tell them apart.
    matrices = matrices + 0.01 / kappa * torch.randn(matrices.shape, generator=generator)
    matrices.requires_grad_()
    # A rate moves by a share of its own size.
    optimizer = torch.optim.Adam([matrices], lr=a.lr / kappa, betas=(0.9, 0.99))
    start = time.perf_counter()
    for step in range(a.steps):
        for group in optimizer.param_groups:
            group["lr"] = a.lr / kappa * (1 - step / a.steps)
        x, y, query, target = tasks(spectrum, kappa, dim, a.batch, generator)
        prediction = looped_linear_attention(x, y, query, matrices, loops).prediction
        optimizer.zero_grad()
        # The logarithm, as the loss falls over orders of magnitude.
        (prediction - target).square().mean().log().backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    test = torch.Generator().manual_seed(10**6)
    with torch.no_grad():
        results = {
            str(scale): losses(matrices.detach(), tasks(spectrum, kappa, dim, TEST_TASKS, test, scale), loops).tolist()
            for scale in SCALES
        }
    return {
        "spectrum": spectrum, "kappa": kappa, "loops": loops, "free": free, "seed": seed, "dim": dim,
        "loss": {scale: found[-1] for scale, found in results.items()}, "per_loop": results["1.0"],
        "falls": spectra.falls(results["1.0"]), "seconds": seconds,
    }  # fmt: skip


def trained(a: argparse.Namespace) -> list[dict[str, Any]]:
    records = []
    for spectrum, kappa, loops in TRAINED:
        for free in (False, True):
            for seed in range(a.seeds):
                records.append(train(a, spectrum, kappa, loops, free, seed))
                print(json.dumps({k: v for k, v in records[-1].items() if k != "per_loop"}), flush=True)
    return records


def tables(exact: dict[str, Any], records: list[dict[str, Any]]) -> str:
    read_outs = "read-outs fall: looped, free (increasing, decreasing rates)"
    lines = [f"| kappa | L | looped | free | looped at 1.1 x | free at 1.1 x | {read_outs} |", "|---" * 7 + "|"]
    for r in exact["broad"]:
        lines.append(
            f"| {r['kappa']:g} | {r['loops']} | {r['looped']:.1e} | {r['free']:.1e} | {r['looped_scaled_1.1']:.1e} "
            f"| {r['free_scaled_1.1']:.1e} | {r['looped_falls']}, {r['free_falls_increasing']}, "
            f"{r['free_falls_decreasing']} |"
        )
    lines += ["", "| atoms = L | scale | looped | free |", "|---" * 4 + "|"]
    lines += [f"| {r['loops']} | {r['scale']} | {r['looped']:.1e} | {r['free']:.1e} |" for r in exact["atoms"]]
    lines += ["", f"| trained | L | layers | {' | '.join(f'loss at {s} x' for s in SCALES)} | read-outs fall |"]
    lines += ["|---" * (len(SCALES) + 4) + "|"]
    cases = dict.fromkeys((r["spectrum"], r["kappa"], r["loops"], r["free"]) for r in records)
    for spectrum, kappa, loops, free in cases:
        rows = [
            r for r in records if (r["spectrum"], r["kappa"], r["loops"], r["free"]) == (spectrum, kappa, loops, free)
        ]
        cells = []
        for scale in SCALES:
            found = [r["loss"][str(scale)] for r in rows]
            cells.append(f"{statistics.mean(found):.1e} ({min(found):.1e} to {max(found):.1e})")
        fall = f"{sum(r['falls'] for r in rows)} of {len(rows)}"
        lines.append(
            f"| {spectrum}, kappa {kappa:g} | {loops} | {'free' if free else 'looped'} | {' | '.join(cells)} | {fall} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dim", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.1, help="times 1 / kappa")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write both tables and the machine as JSON")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    exact = computed()
    records = trained(a)
    print(tables(exact, records))
    if a.out:
        case = {key: value for key, value in vars(a).items() if key != "out"}
        a.out.write_text(
            json.dumps({**case, **runner.machine(), "computed": exact, "trained": records}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
