"""The C++ row pass of linear_distill_loss alone, ns per logit and core, beside a copy of the same bytes.

python -m benchmarks.ops.distill_rows                every divergence, on one thread, logits from memory
python -m benchmarks.ops.distill_rows --vocab 4096   another row length
"""

import argparse
import time
from collections.abc import Callable

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch

from effkern.ops.distill.chunked import NUM_STATS
from effkern.ops.distill.cpp import cpp_rows
from effkern.ops.distill.rows import DIVERGENCES, RowOptions, Rows

ROWS, KEPT = 256, 16
# Values for the divergences that have parameters.
PARAMETERS = {"alpha": 0.1, "beta": 0.5}


def options(divergence: str, **others: object) -> RowOptions:
    """RowOptions of a divergence with the parameters above."""
    needed = DIVERGENCES[divergence].parameters
    return RowOptions(divergence, **{name: PARAMETERS[name] for name in needed}, **others)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=15)
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    z, u = torch.randn(ROWS, a.vocab), torch.randn(ROWS, a.vocab)
    labels, ones, stats = torch.randint(0, a.vocab, (ROWS,)), torch.ones(ROWS), torch.empty(NUM_STATS, ROWS)
    ids = torch.randint(0, a.vocab, (ROWS, KEPT))
    logprobs = torch.log_softmax(torch.randn(ROWS, KEPT), -1)

    def run(o: RowOptions, dense: torch.Tensor | None, sparse: bool = False, grad: bool = True) -> Callable[[], object]:
        omega = torch.full((ROWS,), 0.5)
        kept = (ids if sparse else None, logprobs if sparse else None)
        rows = Rows(z, dense, kept[0], kept[1], None, labels, ones, omega, stats)
        return lambda: cpp_rows(rows, torch.float32 if grad else None, o)

    plain = options("forward_kl")
    cases: dict[str, Callable[[], object]] = {
        "copy (8 bytes a logit)": lambda: z.copy_(u),
        "no teacher": run(plain, None),
        "no teacher, evaluation": run(plain, None, grad=False),
        f"top-{KEPT} teacher": run(options("forward_kl", teacher="tail_bucket"), None, sparse=True),
        "forward_kl, evaluation": run(plain, u, grad=False),
        "forward_kl, bf16 teacher": run(plain, u.bfloat16()),
        **{name: run(options(name), u) for name in DIVERGENCES},
    }
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(a.rounds):
        for name, call in cases.items():
            z.normal_()
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    print(runner.machine())
    for name, seconds in best.items():
        print(f"{name:<28} {seconds / ROWS / a.vocab * 1e9:.2f} ns per logit and core")


if __name__ == "__main__":
    main()
