"""token_stats beside the bare product, eager and torch.compile.

    python -m benchmarks.ops.token_stats [--dtype bfloat16] [--ignored 0.5]

The floor is the product hidden weight^T alone by torch.mm, into a buffer that exists, all rows at once; ignored rows
are in it. The second line is the floor through the library calls that the op makes.
"""

import argparse
import json
from collections.abc import Callable

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from effkern import token_stats
from effkern.ops.distill import gemm
from effkern.ops.token_stats import reference

CHECK_ROWS = 32
Variants = dict[str, Callable[[], object]]


def make(rows: int, dim: int, vocab: int, dtype: torch.dtype, ignored: float, device: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, dim, device=device).to(dtype)
    weight = (torch.randn(vocab, dim, device=device) * 2 / dim**0.5).to(dtype)
    labels = torch.randint(vocab, (rows,), device=device)
    labels[torch.randperm(rows, device=device)[: int(ignored * rows)]] = -100
    return hidden, weight, labels


def check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """No number on a wrong result."""
    got = token_stats(hidden, weight, labels)
    truth = reference.token_stats(hidden.double(), weight.double(), labels)
    rank_ok = (got.rank - truth[3]).abs().max() <= 2
    if not rank_ok or not torch.allclose(got.loss.double(), truth[0], rtol=1e-5, atol=1e-5):
        raise SystemExit("wrong result: nothing is timed")


def variants(hidden: Tensor, weight: Tensor, labels: Tensor) -> Variants:
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    compiled = torch.compile(reference.token_stats)
    return {
        "product": lambda: torch.mm(hidden, weight.t(), out=logits),
        "product as in effkern": lambda: gemm.logits(hidden, weight, None),
        "effkern": lambda: token_stats(hidden, weight, labels),
        "torch.compile": lambda: compiled(hidden, weight, labels),
        "eager": lambda: reference.token_stats(hidden, weight, labels),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--ignored", type=float, default=0.0, help="share of the rows without a label")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.device == "cpu":
        torch.set_num_threads(a.threads)
    tensors = make(a.rows, a.dim, a.vocab, getattr(torch, a.dtype), a.ignored, a.device)
    if a.peak_of:
        print(runner.peak_memory(lambda: variants(*tensors)[a.peak_of]))
        return

    hidden, weight, labels = tensors
    check(hidden[:CHECK_ROWS], weight, labels[:CHECK_ROWS])
    runs = variants(*tensors)
    timings = runner.interleave(runs, a.rounds)
    case = {k: getattr(a, k) for k in ("rows", "dim", "vocab", "ignored", "dtype", "device")}
    extra: dict[str, dict] = {}
    for name, run in runs.items():
        if a.device != "cpu":
            extra[name] = {"peak_mib": runner.peak_device_memory(run) / 2**20}
        elif not name.startswith("product"):
            options = [f"--{k}={v}" for k, v in case.items()] + [f"--threads={a.threads}", f"--peak-of={name}"]
            extra[name] = {"peak_mib": int(runner.in_fresh_process("benchmarks.ops.token_stats", *options)) / 2**20}
    if a.json:
        print("\n".join(runner.result_lines("token_stats", case, timings, extra)))
    else:
        print(json.dumps({**case, **runner.machine()}))
        print(runner.table(timings, "product", extra))
        print("peak: memory beyond the inputs")


if __name__ == "__main__":
    main()
