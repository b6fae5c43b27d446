"""mean_pool beside embedding_bag, torch.compile and a bare gather, and with the projection folded into the table.

    python -m benchmarks mean_pool [--kinds tokens hidden --dtypes float32 bfloat16 --vocab 32000 --dim 512]

tokens: `embedding_bag` (mode="mean") is the peer and the floor; `gather` is index_select of all rows, which eager code
then sums. `folded` pools the table that `fold_projection` made (64 columns) and divides by the length, which replaces
mean, standardisation, projection and length of `projected`. hidden: norm_mean_pool over hidden states beside rms_norm
and mean. The work counts each row of the table that an id names once, however often it is named; every call takes the
next of several tables.
"""

from collections.abc import Sequence
from functools import cache

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Axis, Case, Op, Prepared, Run, Scaling, Work, bound_of, compiled, hold, item_bytes
from effkern import fold_projection, mean_pool, norm_mean_pool

KEEP = 64
CHECK = {"groups": 3, "length": 40, "vocab": 100, "dim": 80}


def offsets_of(case: Case) -> Tensor:
    return torch.arange(0, case["groups"] * case["length"] + 1, case["length"], device=case["device"])


@cache
def ids_of(tokens: int, vocab: int) -> Tensor:
    """Zipf-like, as words are."""
    drawn = torch.rand(tokens, generator=torch.Generator().manual_seed(0))
    return (drawn.pow(3) * vocab).long().clamp_max(vocab - 1)


def rows_of(case: Case) -> int:
    """Rows that must be read: of the table those that an id names, or all hidden states."""
    tokens = case["groups"] * case["length"]
    return ids_of(tokens, case["vocab"]).unique().numel() if case["kind"] == "tokens" else tokens


def make(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Table or hidden states, ids, offsets."""
    torch.manual_seed(0)
    tokens, vocab, dtype = case["groups"] * case["length"], case["vocab"], getattr(torch, case["dtype"])
    rows = vocab if case["kind"] == "tokens" else tokens
    table = torch.randn(rows, case["dim"], device=case["device"]).to(dtype)
    return table, ids_of(tokens, vocab).to(case["device"]), offsets_of(case)


def projection(dim: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, scale, components."""
    mean, scale = torch.randn(dim, device=device) / 10, torch.rand(dim, device=device) + 0.5
    return mean, scale, torch.linalg.qr(torch.randn(dim, KEEP, device=device))[0].t().contiguous()


def eager_tokens(table: Tensor, ids: Tensor, groups: int) -> Tensor:
    return table[ids].view(groups, -1, table.shape[1]).float().mean(1)


def eager_hidden(hidden: Tensor, weight: Tensor, groups: int) -> Tensor:
    normed = F.rms_norm(hidden.float(), weight.shape, weight, 1e-6).to(hidden.dtype)
    return normed.view(groups, -1, hidden.shape[1]).float().mean(1)


def check(case: Case) -> None:
    case = {**case, **CHECK}
    table, ids, offsets = make(case)
    if case["kind"] == "hidden":
        weight = torch.rand(case["dim"], device=case["device"]) + 0.5
        normed = F.rms_norm(table.double(), weight.shape, weight.double(), 1e-6)
        truth = normed.view(case["groups"], -1, case["dim"]).mean(1)
        return hold([(norm_mean_pool(table, offsets, norm_weight=weight), truth)], 1e-5)
    truth = table.double()[ids].view(case["groups"], -1, case["dim"]).mean(1)
    mean, scale, components = projection(case["dim"], case["device"])
    unit = F.normalize((truth - mean) / scale @ components.t().double(), dim=1)
    folded = fold_projection(table, mean, scale, components, dtype=table.dtype)
    hold([(mean_pool(table, ids, offsets), truth)], 1e-5)
    hold([(mean_pool(folded, ids, offsets, normalize=True), unit)], bound_of(case["dtype"], exact=1e-4))


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    table, ids, offsets = make(case)
    groups, dim = case["groups"], case["dim"]
    if case["kind"] == "hidden":
        weight = torch.rand(dim, device=case["device"]) + 0.5
        made: dict[str, Run] = {
            "effkern": lambda: norm_mean_pool(table, offsets, norm_weight=weight),
            "eager": lambda: eager_hidden(table, weight, groups),
            "torch.compile": lambda: compiled(eager_hidden)(table, weight, groups),
        }
        return Prepared({name: made[name] for name in names if name in made}, held=read_bytes(case))
    mean, scale, components = projection(dim, case["device"])
    folded = fold_projection(table, mean, scale, components, dtype=table.dtype)
    made = {
        "embedding_bag": lambda: F.embedding_bag(ids, table, offsets, mode="mean", include_last_offset=True),
        "effkern": lambda: mean_pool(table, ids, offsets),
        "eager": lambda: eager_tokens(table, ids, groups),
        "torch.compile": lambda: compiled(eager_tokens)(table, ids, groups),
        "gather": lambda: table.index_select(0, ids),
        "projected": lambda: F.normalize((mean_pool(table, ids, offsets) - mean) / scale @ components.t(), dim=1),
        "folded": lambda: mean_pool(folded, ids, offsets, normalize=True),
    }
    return Prepared({name: made[name] for name in names}, held=read_bytes(case))


def read_bytes(case: Case) -> int:
    """Rows and ids, each once."""
    ids = 8 * case["groups"] * case["length"] if case["kind"] == "tokens" else 0
    return rows_of(case) * case["dim"] * item_bytes(case["dtype"]) + ids


def work(case: Case) -> Work:
    return Work(read_bytes(case) + 4 * case["groups"] * case["dim"])


def works(case: Case) -> dict[str, Work | None]:
    """embedding_bag's result has the table's dtype, and `gather` writes a row for each id."""
    size, read = item_bytes(case["dtype"]), read_bytes(case)
    result = size * case["groups"] * case["dim"]
    return {"embedding_bag": Work(read + result), "gather": Work(read + result * case["length"]), "projected": None,
            "folded": None}  # fmt: skip


SCALED = {"kind": "tokens", "dtype": "float32", "vocab": 4096, "dim": 64, "length": 128, "groups": 64}
OP = Op(
    name="mean_pool",
    doc=__doc__,
    axes=(
        Axis("kind", "--kinds", ("tokens", "hidden"), ("tokens", "hidden")),
        Axis("dtype", "--dtypes", ("float32", "bfloat16"), ("float32", "bfloat16")),
        Axis("vocab", "--vocab", (32000,)),
        Axis("dim", "--dim", (512,)),
        Axis("length", "--length", (1280,)),
        Axis("groups", "--groups", (64,)),
    ),
    variants=("embedding_bag", "effkern", "eager", "torch.compile", "gather", "projected", "folded"),
    check=check,
    prepare=prepare,
    work=work,
    works=works,
    floor={"embedding_bag": 1.0},
    registry=("mean_pool",),
    rotates=True,
    scaling=(
        Scaling("groups", (16, 32, 64, 128, 256), SCALED, "1: every group costs the same"),
        Scaling("length", (64, 128, 256, 512, 1024), SCALED, "1: every id costs the same"),
    ),
    no_huge="offsets of rows are 64-bit products; a table of 2^31 elements takes 8 GiB and says no more",
)

if __name__ == "__main__":
    harness.main(OP)
