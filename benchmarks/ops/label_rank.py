"""label_rank beside one read of the same bytes, eager, torch.compile and the usual top-k test.

    python -m benchmarks.ops.label_rank [--dtype bfloat16]

The floor is a row maximum by torch: it reads every logit once and computes next to nothing.
"""

import argparse
import json
from collections.abc import Callable

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from effkern.ops.token_stats import label_rank, reference

K = 10


def plain(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return reference.label_rank(logits, labels, -100, logits.shape[1])


def top_k(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What scoring code without a rank does: cross entropy, and the label looked up among the K best."""
    loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return loss, (logits.topk(K, dim=1).indices == labels[:, None]).any(dim=1)


def check(logits: Tensor, labels: Tensor) -> None:
    """No number on a wrong result."""
    got, truth = label_rank(logits, labels), plain(logits.double(), labels)
    if not torch.equal(got.rank, truth[3]) or not torch.allclose(got.loss.double(), truth[0], rtol=1e-5, atol=1e-5):
        raise SystemExit("wrong result: nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    a = parser.parse_args()
    if a.device == "cpu":
        torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    logits = torch.randn(a.rows, a.vocab, device=a.device).to(getattr(torch, a.dtype)) * 3
    labels = torch.randint(a.vocab, (a.rows,), device=a.device)
    check(logits[:32], labels[:32])

    compiled = torch.compile(plain)
    variants: dict[str, Callable[[], object]] = {
        "row maximum": lambda: logits.amax(dim=1),
        "effkern": lambda: label_rank(logits, labels),
        "torch.compile": lambda: compiled(logits, labels),
        "eager": lambda: plain(logits, labels),
        f"cross entropy + top-{K}": lambda: top_k(logits, labels),
    }
    timings = runner.interleave(variants, a.rounds)
    num_bytes = logits.numel() * logits.element_size()
    extra: dict[str, dict] = {name: {"gb_per_s": num_bytes / t.wall / 1e9} for name, t in timings.items()}
    case = {k: getattr(a, k) for k in ("rows", "vocab", "dtype", "device")}
    if a.json:
        print("\n".join(runner.result_lines("label_rank", case, timings, extra)))
    else:
        print(json.dumps({**case, **runner.machine()}))
        print(runner.table(timings, "row maximum", extra))
        print(f"logits: {num_bytes / 2**20:.0f} MiB; effkern reads {extra['effkern']['gb_per_s']:.1f} GB/s")


if __name__ == "__main__":
    main()
