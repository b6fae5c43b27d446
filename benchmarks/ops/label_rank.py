"""label_rank beside one read of the same bytes, eager, torch.compile and the usual top-k test.

    python -m benchmarks.ops.label_rank [--dtype bfloat16]

The floor is a row maximum by torch: it reads every logit once and computes next to nothing.
"""

from collections.abc import Sequence

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness  # isort: skip

import torch
from torch import Tensor

from benchmarks.case import (
    Axis,
    Case,
    Huge,
    Op,
    Prepared,
    Run,
    Scaling,
    Work,
    WrongResult,
    compiled,
    item_bytes,
    num_bytes,
)
from effkern.ops.token_stats import label_rank, reference

K = 10
CHECK_ROWS = 32
# Label, and loss, lse, logit and rank.
ROW_BYTES = 8 + 3 * 4 + 8


def plain(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return reference.label_rank(logits, labels, -100, logits.shape[1])


def top_k(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What scoring code without a rank does: cross entropy, and the label looked up among the K best."""
    loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return loss, (logits.topk(K, dim=1).indices == labels[:, None]).any(dim=1)


def make(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(case["rows"], case["vocab"], device=case["device"]).to(getattr(torch, case["dtype"])) * 3
    return logits, torch.randint(case["vocab"], (case["rows"],), device=case["device"])


def check(case: Case) -> None:
    logits, labels = make({**case, "rows": min(case["rows"], CHECK_ROWS)})
    got, truth = label_rank(logits, labels), plain(logits.double(), labels)
    if not torch.equal(got.rank, truth[3]) or not torch.allclose(got.loss.double(), truth[0], rtol=1e-5, atol=1e-5):
        raise WrongResult("wrong result: nothing is timed")


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    logits, labels = make(case)
    made: dict[str, Run] = {
        "row maximum": lambda: logits.amax(dim=1),
        "effkern": lambda: label_rank(logits, labels),
        "torch.compile": lambda: compiled(plain)(logits, labels),
        "eager": lambda: plain(logits, labels),
        f"cross entropy + top-{K}": lambda: top_k(logits, labels),
    }
    return Prepared({name: made[name] for name in names}, held=num_bytes(logits))


def work(case: Case) -> Work:
    return Work(case["rows"] * (case["vocab"] * item_bytes(case["dtype"]) + ROW_BYTES))


def huge() -> Huge:
    """More than 2^31 logits; the last rows must be what they are alone."""
    vocab = 128256
    rows = (1 << 31) // vocab // 8 * 8 + 16

    def run() -> None:
        logits, labels = make({"rows": 8, "vocab": vocab, "dtype": "bfloat16", "device": "cpu"})
        wide = label_rank(logits.expand(rows // 8, 8, vocab).reshape(rows, vocab), labels.repeat(rows // 8))
        if not all(torch.equal(a[-8:], b) for a, b in zip(wide, label_rank(logits, labels))):
            raise WrongResult("wrong result in the last rows")

    return Huge(rows * vocab * 2, f"{rows} x {vocab} logits, bfloat16", run)


OP = Op(
    name="label_rank",
    doc=__doc__,
    axes=(
        Axis("rows", "--rows", (1024,)),
        Axis("vocab", "--vocab", (32000,)),
        Axis("dtype", "--dtype", ("float32",), ("float32", "bfloat16", "float16")),
    ),
    variants=("row maximum", "effkern", "torch.compile", "eager", f"cross entropy + top-{K}"),
    check=check,
    prepare=prepare,
    work=work,
    floor={"row maximum": 1.0},
    registry=("label_rank",),
    rotates=True,
    scaling=(
        Scaling("rows", (64, 128, 256, 512, 1024), {"vocab": 8000, "dtype": "float32"}, "1: every row costs the same"),
        Scaling("vocab", (4000, 8000, 16000, 32000, 64000), {"rows": 128, "dtype": "float32"}, "1: one pass"),
    ),
    huge=huge,
)

if __name__ == "__main__":
    harness.main(OP)
