"""soft_labels (a teacher's labels for the cache) beside the bare product and the same entries by eager PyTorch.

    python -m benchmarks.ops.soft_labels                              top-16, 50 draws, 8 exact + 8 draws
    python -m benchmarks.ops.soft_labels --methods topk --dtype bfloat16

The floor is the product hidden weight^T alone by torch.mm, into a buffer that exists, all rows at once. `eager` is
log_softmax and topk or multinomial over all logits. The cache itself: python -m benchmarks.soft_labels.
"""

from collections.abc import Sequence
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness  # isort: skip

import torch
from torch import Tensor

from benchmarks.case import Axis, Case, Op, Prepared, Run, Scaling, Work, WrongResult, item_bytes
from effkern import soft_labels
from effkern.ops.distill.chunked import chunk_bytes, chunk_rows

METHODS: dict[str, dict[str, Any]] = {"topk": {"k": 16}, "sampled": {"draws": 50}, "stratified": {"k": 8, "draws": 8}}
CHECK_ROWS = 64
BINS = 8
STANDARD_ERRORS = 5.0


def make(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    hidden = torch.randn(case["rows"], case["dim"], device=case["device"]).to(dtype)
    weight = torch.randn(case["vocab"], case["dim"], device=case["device"]) * 2 / case["dim"] ** 0.5
    return hidden, weight.to(dtype)


def handwritten(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax((hidden @ weight.t()).float(), -1)
    given = METHODS[case["method"]]
    if case["method"] == "topk":
        top = logp.topk(given["k"], dim=1)
        return top.indices, top.values
    if case["method"] == "sampled":
        return logp, torch.multinomial(logp.exp(), given["draws"], replacement=True)
    head = logp.topk(given["k"], dim=1)
    rest = logp.exp().scatter_(1, head.indices, 0.0)
    return head.values, torch.multinomial(rest, given["draws"], replacement=True)


def check(case: Case) -> None:
    """Against plain PyTorch in float64: entries of the head, mass outside of the kept ones, frequencies of draws."""
    hidden, weight = make({**case, "rows": min(case["rows"], CHECK_ROWS)})
    found = soft_labels(hidden, weight, method=case["method"], **METHODS[case["method"]])
    logits = hidden.double() @ weight.double().t()
    logp = torch.log_softmax(logits, 1)
    bound = 1e-4 if case["dtype"] == "float32" else 1e-3
    errors = [(found.lse.double() - logits.logsumexp(1)).abs().max()]
    k = METHODS[case["method"]].get("k", 0)
    if k:
        top, ids = logp.topk(k, dim=1).values, found.ids[:, :k].long()
        errors.append((found.logprobs[:, :k].double() - top).abs().max())
        # By what the ids name, as of two that are as likely either may come first.
        errors.append((logp.gather(1, ids) - top).abs().max())
        if ids.sort(1).values.diff(dim=1).eq(0).any():
            raise WrongResult("wrong result: one id twice among the most likely of a token; nothing is timed")
    if case["method"] != "topk":
        # Counts of draws add up to all of the mass that was drawn from.
        mass = found.logprobs[:, k:].double().exp().sum(1)
        whole = found.tail.double() if k else torch.ones_like(mass)
        errors.append((mass - whole).abs().max())
        check_draws(case, logp, found.ids[:, k:].long(), found.logprobs[:, k:].double().exp() / whole[:, None], k)
    if not all(e.item() <= bound for e in errors):
        raise WrongResult(f"wrong result: error {max(errors):.1e} > {bound:.0e}; nothing is timed")


def check_draws(case: Case, logp: Tensor, ids: Tensor, shares: Tensor, k: int) -> None:
    """Shares of draws, by how likely the ids are: of each eighth of the mass as many as there should be.

    Over all tokens; a number of draws is within some standard errors of what is expected, sqrt(sum n q (1 - q)).
    """
    q = logp.exp()
    if k:
        q.scatter_(1, logp.topk(k, dim=1).indices, 0.0)
        q /= q.sum(1, keepdim=True)
    falling, order = q.sort(1, descending=True)
    middle = falling.cumsum(1) - falling / 2
    bins = torch.empty_like(order).scatter_(1, order, (middle * BINS).long().clamp_max(BINS - 1))
    wide = q.new_zeros(len(q), BINS)
    expected = wide.scatter_add(1, bins, q)
    # Empty slots have id -1 and no mass; an id of the head is in no bin of its own.
    named = bins.gather(1, ids.clamp_min(0))
    drawn = wide.scatter_add(1, named, torch.where(q.gather(1, ids.clamp_min(0)) > 0, shares, 0.0))
    draws = METHODS[case["method"]]["draws"]
    error = (draws * expected * (1 - expected)).sum(0).sqrt()
    if not (draws * (drawn - expected).sum(0).abs() <= STANDARD_ERRORS * error + 1e-6).all():
        raise WrongResult("wrong result: draws do not follow the teacher's probabilities; nothing is timed")


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    hidden, weight = make(case)
    logits: list[Tensor] = []

    def product() -> object:
        if not logits:
            logits.append(hidden.new_empty(hidden.shape[0], weight.shape[0]))
        return torch.mm(hidden, weight.t(), out=logits[0])

    made: dict[str, Run] = {
        "product": product,
        "effkern": lambda: soft_labels(hidden, weight, method=case["method"], **METHODS[case["method"]]),
        "eager": lambda: handwritten(case, hidden, weight),
    }
    return Prepared({name: made[name] for name in names})


def work(case: Case) -> Work:
    rows, dim, vocab = case["rows"], case["dim"], case["vocab"]
    entries = sum(METHODS[case["method"]].values())
    moved = (rows + vocab) * dim * item_bytes(case["dtype"]) + rows * (8 * entries + 8)
    return Work(moved, 2.0 * rows * dim * vocab, case["dtype"])


def why(case: Case) -> list[str]:
    device = torch.device(case["device"])
    rows = chunk_rows(case["rows"], case["vocab"], case["dim"], 4, chunk_bytes(device))
    return [
        f"{-(-case['rows'] // rows)} chunks of {rows} rows: float32 logits of at most {chunk_bytes(device) >> 20} MiB"
    ]


OP = Op(
    name="soft_labels",
    doc=__doc__,
    axes=(
        Axis("method", "--methods", tuple(METHODS), tuple(METHODS)),
        Axis("rows", "--rows", (1024,)),
        Axis("dim", "--dim", (512,)),
        Axis("vocab", "--vocab", (32000,)),
        Axis("dtype", "--dtype", ("float32",), ("float32", "bfloat16")),
    ),
    variants=("product", "effkern", "eager"),
    check=check,
    prepare=prepare,
    work=work,
    floor={"product": 1.0},
    registry=("soft_labels",),
    why=why,
    scaling=(
        Scaling("rows", (64, 128, 256, 512, 1024),
                {"method": "topk", "dim": 128, "vocab": 8000, "dtype": "float32"}, "1: every row costs the same"),
        Scaling("vocab", (2000, 4000, 8000, 16000, 32000),
                {"method": "topk", "rows": 256, "dim": 128, "dtype": "float32"}, "1: every entry costs the same"),
    ),
    no_huge="its logits exist one chunk at a time, through the same code as those of token_stats",
)  # fmt: skip

if __name__ == "__main__":
    harness.main(OP)
