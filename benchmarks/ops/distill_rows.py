"""The C++ row pass of linear_distill_loss alone, ns per logit and core, beside a copy of the same bytes.

python -m benchmarks.ops.distill_rows                every divergence, on one thread, logits from memory
python -m benchmarks.ops.distill_rows --vocab 4096   another row length
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from benchmarks.case import WrongResult, hold
from effkern.ops.distill.chunked import NUM_STATS
from effkern.ops.distill.cpp import cpp_rows
from effkern.ops.distill.reference import reference_rows
from effkern.ops.distill.rows import DIVERGENCES, RowOptions, Rows

ROWS, KEPT = 256, 16
# Values for the divergences that have parameters.
PARAMETERS = {"alpha": 0.1, "beta": 0.5}


def options(divergence: str, **others: object) -> RowOptions:
    """RowOptions of a divergence with the parameters above."""
    needed = DIVERGENCES[divergence].parameters
    return RowOptions(divergence, **{name: PARAMETERS[name] for name in needed}, **others)  # type: ignore[arg-type]


class Inputs(NamedTuple):
    z: Tensor
    u: Tensor
    labels: Tensor
    ids: Tensor
    logprobs: Tensor


class Kind(NamedTuple):
    """One row pass: `dense`: a teacher's logits, `sparse`: kept entries, neither: none."""

    options: RowOptions
    dense: torch.dtype | None = None
    sparse: bool = False
    grad: bool = True


KINDS = {
    "no teacher": Kind(options("forward_kl")),
    "no teacher, evaluation": Kind(options("forward_kl"), grad=False),
    f"top-{KEPT} teacher": Kind(options("forward_kl", teacher="tail_bucket"), sparse=True),
    "forward_kl, evaluation": Kind(options("forward_kl"), torch.float32, grad=False),
    "forward_kl, bf16 teacher": Kind(options("forward_kl"), torch.bfloat16),
    **{name: Kind(options(name), torch.float32) for name in DIVERGENCES},
}


def make(rows: int, vocab: int) -> Inputs:
    torch.manual_seed(0)
    ids = torch.rand(rows, vocab).topk(KEPT, dim=1).indices
    labels = torch.randint(0, vocab, (rows,))
    logprobs = torch.log_softmax(torch.randn(rows, vocab), -1).gather(1, ids)
    return Inputs(torch.randn(rows, vocab), torch.randn(rows, vocab), labels, ids, logprobs)


def rows_of(i: Inputs, kind: Kind) -> Rows:
    count = len(i.z)
    ids, logprobs = (i.ids, i.logprobs) if kind.sparse else (None, None)
    teacher = None if kind.dense is None else i.u.to(kind.dense)
    ones, stats = torch.ones(count), torch.empty(NUM_STATS, count)
    return Rows(i.z, teacher, ids, logprobs, None, i.labels, ones, torch.full((count,), 0.5), stats)


def check(kind: Kind, vocab: int) -> None:
    """Gradient and statistics of a few rows against plain PyTorch."""
    dtype = torch.float32 if kind.grad else None
    got, want = rows_of(make(4, vocab), kind), rows_of(make(4, vocab), kind)
    grad, truth = cpp_rows(got, dtype, kind.options), reference_rows(want, dtype, kind.options)
    # Statistics without a value are infinite in both.
    if not torch.allclose(got.stats_SR, want.stats_SR, rtol=1e-3, atol=1e-4):
        raise WrongResult(f"wrong statistics of {kind.options.divergence}; nothing is timed")
    if grad is not None and truth is not None:
        hold([(grad, truth.double())], 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=15)
    a = parser.parse_args()
    torch.set_num_threads(1)
    for kind in KINDS.values():
        check(kind, a.vocab)
    i = make(ROWS, a.vocab)

    def run(kind: Kind) -> Callable[[], object]:
        rows = rows_of(i, kind)
        return lambda: cpp_rows(rows, torch.float32 if kind.grad else None, kind.options)

    cases: dict[str, Callable[[], object]] = {"copy (8 bytes a logit)": lambda: i.z.copy_(i.u)}
    cases |= {name: run(kind) for name, kind in KINDS.items()}
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(a.rounds):
        for name, call in cases.items():
            i.z.normal_()
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    print(runner.machine())
    for name, seconds in best.items():
        print(f"{name:<28} {seconds / ROWS / a.vocab * 1e9:.2f} ns per logit and core")


if __name__ == "__main__":
    main()
