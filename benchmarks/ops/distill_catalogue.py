"""Every divergence of linear_distill_loss in one table: times over the bare products, and memory.

    python -m benchmarks.ops.distill_catalogue                        teacher logits, float32 and bfloat16
    python -m benchmarks.ops.distill_catalogue --case hidden          the teacher's output layer inside; with Liger
    python -m benchmarks.ops.distill_catalogue --memory               and the peak of every variant (slow)
    python -m benchmarks.ops.distill_catalogue --chunks               effkern in chunks of 8 to 128 MiB of logits

Within a row the variants take turns; rows are independent runs. The floor is torch.mm on the same data. malloc keeps
freed memory, as in a training process.
"""

import argparse
import json
from pathlib import Path

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness, runner  # isort: skip

import torch

from benchmarks.ops import distill
from effkern.ops.distill.rows import DIVERGENCES

NAMES = ["products", "products as in effkern", "effkern", "torch.compile", "eager"]


def measure(case: dict, rounds: int, threads: int, memory: bool, shares: list[str]) -> dict:
    """One row: ratios of wall and of process CPU time to the products, and MiB."""
    torch.compiler.reset()
    distill.check(case)
    known = [*NAMES, *distill.CHUNKS, *([distill.LIGER_NAME] if case["case"] == "hidden" else [])]
    runs = distill.variants(distill.inputs_of(case), [name for name in known if name in shares])
    timings = runner.interleave(runs, rounds)
    floor = timings["products"]
    row: dict = {**case, "floor_ms": floor.wall * 1e3}
    for name, t in timings.items():
        row[name] = {"wall": t.wall / floor.wall, "cpu": t.cpu / floor.cpu}
        if memory and not name.startswith("products"):
            row[name]["peak_mib"] = harness.peak_mib(distill.OP, case, name, threads)
    return row


def markdown(rows: list[dict]) -> str:
    """Ratios of wall time (and of CPU time) to the products; MiB where measured."""
    columns = [n for n in [*NAMES[1:], distill.LIGER_NAME, *distill.CHUNKS] if any(n in row for row in rows)]
    lines = [f"| divergence | dtype | products, ms | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for row in rows:
        cells = []
        for name in columns:
            t = row.get(name)
            text = "" if t is None else f"{t['wall']:.2f} ({t['cpu']:.2f})"
            cells.append(text + (f", {t['peak_mib']:.0f} MiB" if t and "peak_mib" in t else ""))
        lines.append(f"| {row['divergence']} | {row['dtype']} | {row['floor_ms']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["logits", "hidden"], default="logits")
    parser.add_argument("--divergences", nargs="+", choices=list(DIVERGENCES), default=list(DIVERGENCES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=[*NAMES, distill.LIGER_NAME])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--teacher-dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--chunks", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    runner.keep_memory()
    if a.chunks:
        a.variants = ["products", *distill.CHUNKS]
    rows: list[dict] = []
    for dtype in a.dtypes:
        for divergence in a.divergences:
            case = {
                "divergence": divergence, "case": a.case, "rows": a.rows, "dim": a.dim, "teacher_dim": a.teacher_dim,
                "vocab": a.vocab, "dtype": dtype, "device": "cpu",
            }  # fmt: skip
            rows.append(measure(case, a.rounds, a.threads, a.memory, a.variants))
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)
            if a.json:
                # Whole after every row, so that an interrupted run leaves a table.
                temporary = a.json.with_suffix(".tmp")
                temporary.write_text(json.dumps({"machine": runner.machine(), "rows": rows}, indent=1))
                temporary.replace(a.json)
    print(runner.machine())
    print(markdown(rows))


if __name__ == "__main__":
    main()
