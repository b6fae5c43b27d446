"""token_stats beside the bare product, eager and torch.compile.

    python -m benchmarks.ops.token_stats [--dtype bfloat16] [--ignored 0.5]

The floor is the product hidden weight^T alone by torch.mm, into a buffer that exists, all rows at once; ignored rows
are in it. The second line is the floor through the library calls that the op makes.
"""

from collections.abc import Sequence

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness  # isort: skip

import torch
from torch import Tensor

from benchmarks.case import Axis, Case, Huge, Op, Prepared, Run, Scaling, Work, WrongResult, compiled, item_bytes
from effkern import token_stats
from effkern.ops.distill import gemm
from effkern.ops.distill.chunked import chunk_bytes, chunk_rows
from effkern.ops.token_stats import reference

CHECK_ROWS = 32
# Label, and loss, lse, logit and rank.
ROW_BYTES = 8 + 3 * 4 + 8


def make(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    rows, dim, vocab, device = case["rows"], case["dim"], case["vocab"], case["device"]
    dtype = getattr(torch, case["dtype"])
    hidden = torch.randn(rows, dim, device=device).to(dtype)
    weight = (torch.randn(vocab, dim, device=device) * 2 / dim**0.5).to(dtype)
    labels = torch.randint(vocab, (rows,), device=device)
    labels[torch.randperm(rows, device=device)[: int(case["ignored"] * rows)]] = -100
    return hidden, weight, labels


def check(case: Case) -> None:
    hidden, weight, labels = make({**case, "rows": min(case["rows"], CHECK_ROWS)})
    got = token_stats(hidden, weight, labels)
    truth = reference.token_stats(hidden.double(), weight.double(), labels)
    rank_ok = (got.rank - truth[3]).abs().max() <= 2
    if not rank_ok or not torch.allclose(got.loss.double(), truth[0], rtol=1e-5, atol=1e-5):
        raise WrongResult("wrong result: nothing is timed")


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    hidden, weight, labels = make(case)
    # Made by the first that needs it, so that the memory of the others is their own.
    logits: list[Tensor] = []

    def product() -> object:
        if not logits:
            logits.append(hidden.new_empty(hidden.shape[0], weight.shape[0]))
        return torch.mm(hidden, weight.t(), out=logits[0])

    made: dict[str, Run] = {
        "product": product,
        "product as in effkern": lambda: gemm.logits(hidden, weight, None),
        "effkern": lambda: token_stats(hidden, weight, labels),
        "torch.compile": lambda: compiled(reference.token_stats)(hidden, weight, labels),
        "eager": lambda: reference.token_stats(hidden, weight, labels),
    }
    return Prepared({name: made[name] for name in names})


def work(case: Case) -> Work:
    rows, dim, vocab = case["rows"], case["dim"], case["vocab"]
    moved = (rows + vocab) * dim * item_bytes(case["dtype"]) + rows * ROW_BYTES
    return Work(moved, 2.0 * rows * dim * vocab, case["dtype"])


def why(case: Case) -> list[str]:
    device = torch.device(case["device"])
    rows = chunk_rows(case["rows"], case["vocab"], case["dim"], 4, chunk_bytes(device))
    return [
        f"{-(-case['rows'] // rows)} chunks of {rows} rows: float32 logits of at most {chunk_bytes(device) >> 20} MiB"
    ]


def huge() -> Huge:
    """More than 2^31 logits, of which only a chunk ever exists; the last rows must be what they are alone."""
    vocab, dim = 32000, 16
    rows = (1 << 31) // vocab // 8 * 8 + 16

    def run() -> None:
        case = {"rows": rows, "dim": dim, "vocab": vocab, "ignored": 0.0, "dtype": "float32", "device": "cpu"}
        hidden, weight, labels = make(case)
        wide, tail = token_stats(hidden, weight, labels), token_stats(hidden[-64:], weight, labels[-64:])
        # Chunks of other sizes may take other products.
        if not torch.allclose(wide.loss[-64:], tail.loss, rtol=1e-5, atol=1e-5):
            raise WrongResult("wrong result in the last rows")

    return Huge((rows + vocab) * dim * 4 + rows * ROW_BYTES + (256 << 20), f"{rows} x {vocab} logits, D = {dim}", run)


OP = Op(
    name="token_stats",
    doc=__doc__,
    axes=(
        Axis("rows", "--rows", (1024,)),
        Axis("dim", "--dim", (512,)),
        Axis("vocab", "--vocab", (32000,)),
        Axis("ignored", "--ignored", (0.0,), help="share of the rows without a label"),
        Axis("dtype", "--dtype", ("float32",), ("float32", "bfloat16", "float16")),
    ),
    variants=("product", "product as in effkern", "effkern", "torch.compile", "eager"),
    check=check,
    prepare=prepare,
    work=work,
    floor={"product": 1.0},
    registry=("token_stats", "label_rank"),
    why=why,
    memory=True,
    scaling=(
        Scaling("rows", (64, 128, 256, 512, 1024),
                {"dim": 128, "vocab": 8000, "ignored": 0.0, "dtype": "float32"}, "1: every row costs the same"),
        Scaling("vocab", (2000, 4000, 8000, 16000, 32000),
                {"rows": 256, "dim": 128, "ignored": 0.0, "dtype": "float32"}, "1: every entry costs the same"),
    ),
    huge=huge,
)  # fmt: skip

if __name__ == "__main__":
    harness.main(OP)
