"""mean_pool beside embedding_bag, torch.compile and a bare gather, and with the projection folded into the table.

    python -m benchmarks.ops.mean_pool [--vocab 32000 --dim 512 --keep 64 --length 1280 --groups 64]

`embedding_bag` (mode="mean") is the peer; `gather` is index_select of all rows, which eager code then sums: its output
alone is as large as what must be read. `folded` pools the table that `fold_projection` made (K columns) and divides by
the length, which replaces mean, standardisation, projection and length of `projected`. The second table is
norm_mean_pool over hidden states beside rms_norm and mean, eager and compiled. GB/s counts the rows that must be read.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.laurel import repeated
from effkern import fold_projection, mean_pool, norm_mean_pool

Variants = dict[str, Callable[[], Tensor]]


def token_variants(a: argparse.Namespace, dtype: torch.dtype) -> tuple[Variants, int]:
    """The means by different ways, and the bytes of the rows."""
    torch.manual_seed(0)
    table = torch.randn(a.vocab, a.dim, device=a.device).to(dtype)
    # Zipf-like, as words are.
    ranks = torch.rand(a.groups * a.length, device=a.device).pow(3)
    ids = (ranks * a.vocab).long().clamp_max(a.vocab - 1)
    offsets = torch.arange(0, a.groups * a.length + 1, a.length, device=a.device)
    mean, scale = torch.randn(a.dim, device=a.device) / 10, torch.rand(a.dim, device=a.device) + 0.5
    components = torch.linalg.qr(torch.randn(a.dim, a.keep, device=a.device))[0].t().contiguous()
    folded = fold_projection(table, mean, scale, components, dtype=dtype)

    def bag() -> Tensor:
        return F.embedding_bag(ids, table, offsets, mode="mean", include_last_offset=True)

    def eager() -> Tensor:
        return table[ids].view(a.groups, a.length, a.dim).float().mean(1)

    def projected() -> Tensor:
        return F.normalize((mean_pool(table, ids, offsets) - mean) / scale @ components.t(), dim=1)

    found: Variants = {
        "effkern": lambda: mean_pool(table, ids, offsets),
        "embedding_bag": bag,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
        "gather": lambda: table.index_select(0, ids),
        "projected": projected,
        "folded": lambda: mean_pool(folded, ids, offsets, normalize=True),
    }
    truth = table.double()[ids].view(a.groups, a.length, a.dim).mean(1)
    check(found["effkern"](), truth, 1e-5)
    unit = F.normalize((truth - mean) / scale @ components.t().double(), dim=1)
    check(found["folded"](), unit, 1e-4 if dtype == torch.float32 else 2e-2)
    return found, ids.numel() * a.dim * table.itemsize


def hidden_variants(a: argparse.Namespace, dtype: torch.dtype) -> tuple[Variants, int]:
    torch.manual_seed(0)
    hidden = torch.randn(a.groups * a.length, a.dim, device=a.device).to(dtype)
    weight = torch.rand(a.dim, device=a.device) + 0.5
    offsets = torch.arange(0, a.groups * a.length + 1, a.length, device=a.device)

    def eager() -> Tensor:
        normed = F.rms_norm(hidden.float(), (a.dim,), weight, 1e-6).to(dtype)
        return normed.view(a.groups, a.length, a.dim).float().mean(1)

    found: Variants = {
        "effkern": lambda: norm_mean_pool(hidden, offsets, norm_weight=weight),
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    wide = F.rms_norm(hidden.double(), (a.dim,), weight.double(), 1e-6)
    check(found["effkern"](), wide.view(a.groups, a.length, a.dim).mean(1), 1e-5)
    return found, hidden.nbytes


def check(found: Tensor, truth: Tensor, bound: float) -> None:
    """No number on a wrong result."""
    error = ((found.double() - truth).norm() / truth.norm()).item()
    if not error <= bound:
        raise SystemExit(f"wrong result: error {error:.1e} > {bound:.0e}; nothing is timed")


def report(a: argparse.Namespace, case: dict[str, Any], variants: Variants, moved: int) -> None:
    runs = {name: repeated(run) for name, run in variants.items()}
    timings = runner.interleave({name: run for name, (run, _) in runs.items()}, a.rounds)
    timings = {
        name: runner.Timing(*(s / runs[name][1] for s in (t.wall, t.wall_low, t.wall_high, t.cpu)))
        for name, t in timings.items()
    }
    if a.json:
        print("\n".join(runner.result_lines("mean_pool", case, timings, {})), flush=True)
        return
    print(f"{case}: {moved / timings['effkern'].wall / 1e9:.1f} GB/s")
    print(runner.table(timings, "effkern", {}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--keep", type=int, default=64, help="columns of the projection")
    parser.add_argument("--length", type=int, default=1280)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of tables")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if not a.json:
        print(json.dumps(runner.machine()))
    for name in a.dtypes:
        for kind, make in (("tokens", token_variants), ("hidden", hidden_variants)):
            torch._dynamo.reset()
            case = {"kind": kind, "dtype": name, "vocab": a.vocab, "dim": a.dim, "keep": a.keep, "length": a.length}
            variants, moved = make(a, getattr(torch, name))
            with torch.no_grad():
                report(a, {**case, "groups": a.groups, "device": a.device}, variants, moved)


if __name__ == "__main__":
    main()
