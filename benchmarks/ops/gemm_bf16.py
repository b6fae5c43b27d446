"""The bfloat16 products of effkern._C with float32 results beside torch.mm, which rounds its results to bfloat16.

    python -m benchmarks.ops.gemm_bf16                                    logits and weight gradient of one chunk
    python -m benchmarks.ops.gemm_bf16 --rows 255 --dims 511 --vocab 31999
    python -m benchmarks.ops.gemm_bf16 --kernel avx512_bf16               not the fastest that this CPU runs

Process CPU time, the least of several rounds in which the variants take turns. "widened" is what the loss does where
the CPU does not multiply bfloat16. "add" adds to a float32 total, "first" overwrites it.
"""

import argparse
import json
import time
from collections.abc import Callable

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch

from effkern.ops.distill import gemm, gemm_schema

OPS = torch.ops.effkern
RATIOS = {
    "logits": "torch.mm, logits",
    "logits, widened": "torch.mm, logits",
    "first": "torch.mm, gradient",
    "add": "torch.mm, gradient",
    "add, rounded": "torch.mm, gradient",
}


def widened(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """The way of gemm.logits without the kernel."""
    wide = hidden.float()
    for v in range(0, weight.shape[0], gemm.CPU_TILE):
        out[:, v : v + gemm.CPU_TILE] = gemm._onednn_linear(wide, weight[v : v + gemm.CPU_TILE].float())


def add_rounded(total: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """The way of gemm.add_weight_grad without the kernel."""
    for v in range(0, total.shape[0], gemm.CPU_TILE):
        total[v : v + gemm.CPU_TILE] += torch.mm(grad[:, v : v + gemm.CPU_TILE].t(), hidden)


def check(rows: int, vocab: int, dim: int) -> None:
    """No number on a wrong result."""
    hidden, weight, grad = torch.randn(rows, dim), torch.randn(vocab, dim), torch.randn(rows, vocab)
    hidden, weight, grad = hidden.bfloat16(), weight.bfloat16(), grad.bfloat16()
    out, total = torch.empty(rows, vocab), torch.empty(vocab, dim)
    OPS.bf16_mm_nt_(out, hidden, weight)
    OPS.bf16_add_tn_(total, grad, hidden, True)
    for got, a, b in ((out, hidden, weight.t()), (total, grad.t(), hidden)):
        truth = a.double() @ b.double()
        if not (error := ((got - truth).norm() / truth.norm()).item()) < 1e-6:
            raise SystemExit(f"wrong result: relative error {error:.1e}; nothing is timed")


def measure(rows: int, dim: int, vocab: int, rounds: int) -> dict[str, float]:
    """Seconds of each variant."""
    hidden, weight = torch.randn(rows, dim).bfloat16(), torch.randn(vocab, dim).bfloat16()
    out, total = torch.zeros(rows, vocab), torch.zeros(vocab, dim)
    narrow_out, narrow_total = out.bfloat16(), total.bfloat16()
    # As the row pass leaves it: the first half of float32 rows.
    grad = torch.randn(rows, vocab).view(torch.bfloat16)[:, :vocab]
    grad.copy_(torch.randn(rows, vocab))
    runs: dict[str, Callable[[], object]] = {
        "torch.mm, logits": lambda: torch.mm(hidden, weight.t(), out=narrow_out),
        "logits": lambda: OPS.bf16_mm_nt_(out, hidden, weight),
        "logits, widened": lambda: widened(out, hidden, weight),
        "torch.mm, gradient": lambda: torch.mm(grad.t(), hidden, out=narrow_total),
        "first": lambda: OPS.bf16_add_tn_(total, grad, hidden, True),
        "add": lambda: OPS.bf16_add_tn_(total, grad, hidden, False),
        "add, rounded": lambda: add_rounded(total, grad, hidden),
    }
    best = dict.fromkeys(runs, float("inf"))
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if i:
                best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 512, 768, 2048])
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernel", choices=[name for name in gemm_schema.KERNELS if name != "none"])
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    a = parser.parse_args()
    if not gemm_schema.bf16_gemm():
        raise SystemExit("effkern._C is not built, or this CPU does not multiply bfloat16 (AVX512-BF16)")
    if a.kernel:
        gemm_schema.choose(a.kernel)
    kernel = gemm_schema.kernel()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    check(33, 1999, 130)
    if not a.json:
        print(json.dumps(runner.machine()))
        print(f"kernel {kernel}: CPU time of torch.mm in ms, of the others as ratios to it")
        print("| rows | dim | torch.mm, logits | torch.mm, gradient | " + " | ".join(RATIOS) + " |")
        print("|---" * (4 + len(RATIOS)) + "|")
    for rows in a.rows:
        for dim in a.dims:
            cpu = measure(rows, dim, a.vocab, a.rounds)
            if a.json:
                case = {"kernel": kernel, "rows": rows, "dim": dim, "vocab": a.vocab}
                print(json.dumps({"benchmark": "gemm_bf16", **case, "cpu": cpu, **runner.machine()}), flush=True)
                continue
            floors = [f"{cpu[name] * 1e3:.1f}" for name in ("torch.mm, logits", "torch.mm, gradient")]
            ratios = [f"{cpu[name] / cpu[floor]:.2f}" for name, floor in RATIOS.items()]
            print(f"| {rows} | {dim} | {' | '.join(floors + ratios)} |", flush=True)


if __name__ == "__main__":
    main()
