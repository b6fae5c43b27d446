"""linear_distill_loss, forward and backward, beside the bare matrix products, eager, torch.compile and Liger.

    python -m benchmarks.ops.distill                     teacher logits given (three products)
    python -m benchmarks.ops.distill --case hidden       the teacher's output layer inside (four products)
    python -m benchmarks.ops.distill --case hard         no teacher: cross entropy alone
    python -m benchmarks.ops.distill --divergence jsd    another divergence
    python -m benchmarks.ops.distill --tiles             the products of one chunk, by tile width and library

The floor is the matrix products alone by torch.mm, into buffers that exist, all rows at once. The op itself calls a
faster library for two of them; the second line is the floor with those calls. Loss and gradients of every variant are
checked at the size that is timed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness, runner  # isort: skip

import torch

from benchmarks import handwritten
from benchmarks.case import Axis, Case, Huge, Op, Prepared, Run, Scaling, Work, WrongResult, bound_of, hold, item_bytes
from benchmarks.handwritten import OMEGA, PARAMETERS
from effkern import TeacherHidden, TeacherLogits, linear_distill_loss
from effkern.ops.distill import ceilings, cost, gemm
from effkern.ops.distill.rows import DIVERGENCES

CHECK_ROWS = 64
# Logits of one part of the truth.
TRUTH_BYTES = 64 << 20
# The loss in chunks of other sizes than its own.
CHUNKS = {f"{mib} MiB": mib for mib in (8, 16, 32, 64, 128)}
LIGER_NAME = "liger chunked (compiled)"
# Those that Liger has a chunked loss for: beta of its JSD, or its cosine loss.
LIGER = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": PARAMETERS["beta"], "cosine": None}


@dataclass
class Inputs:
    """Tensors of one case; the teacher comes as logits, as hidden states, or not at all."""

    divergence: str

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    teacher_logits: torch.Tensor | None
    teacher_hidden: torch.Tensor | None
    teacher_weight: torch.Tensor | None


def make(
    divergence: str, case: str, rows: int, dim: int, vocab: int, teacher_dim: int, dtype: torch.dtype, device: str
) -> Inputs:
    torch.manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    hidden, weight = random(rows, dim), random(vocab, dim, scale=2 / dim**0.5)
    logits = random(rows, vocab, scale=2.0) if case == "logits" else None
    states = random(rows, teacher_dim) if case == "hidden" else None
    head = random(vocab, teacher_dim, scale=2 / teacher_dim**0.5) if case == "hidden" else None
    labels = torch.randint(0, vocab, (rows,), device=device)
    return Inputs(divergence, hidden.requires_grad_(), weight.requires_grad_(), labels, logits, states, head)


def inputs_of(case: Case) -> Inputs:
    return make(**{**case, "dtype": getattr(torch, case["dtype"])})


def effkern_loss(x: Inputs, chunk_bytes: int | None = None) -> torch.Tensor:
    teacher: TeacherLogits | TeacherHidden | None = None
    if x.teacher_logits is not None:
        teacher = TeacherLogits(x.teacher_logits)
    elif x.teacher_hidden is not None and x.teacher_weight is not None:
        teacher = TeacherHidden(x.teacher_hidden, x.teacher_weight)
    omega, t = (None, None) if teacher is None else (OMEGA, 1.0)
    needed: dict[str, Any] = {name: PARAMETERS[name] for name in DIVERGENCES[x.divergence].parameters}
    return linear_distill_loss(
        x.hidden, x.weight, x.labels, teacher=teacher, omega=omega, temperature=t, teacher_temperature=t,
        divergence=x.divergence, chunk_bytes=chunk_bytes, **needed,
    ).loss  # fmt: skip


def eager_loss(x: Inputs, plain: Callable | None = None) -> torch.Tensor:
    teacher = x.teacher_logits
    if x.teacher_hidden is not None and x.teacher_weight is not None:
        teacher = x.teacher_hidden @ x.teacher_weight.t()
    return (plain or partial(handwritten.loss, x.divergence))(x.hidden, x.weight, x.labels, teacher)


def liger_loss(divergence: str) -> Callable[[Inputs], torch.Tensor] | str:
    """Liger's chunked loss, or why it cannot run."""
    if divergence not in LIGER:
        return f"Liger-Kernel has no chunked {divergence}"
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss, LigerFusedLinearJSDLoss
    except ImportError as error:
        return f"Liger-Kernel: {error}"
    mix = {"weight_hard_loss": 1 - OMEGA, "weight_soft_loss": OMEGA}
    beta = LIGER[divergence]
    loss = LigerFusedLinearCosineSimilarityLoss(**mix) if beta is None else LigerFusedLinearJSDLoss(**mix, beta=beta)

    def run(x: Inputs) -> torch.Tensor:
        return loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels)

    return run


def truth_of(x: Inputs, dtype: torch.dtype) -> list[torch.Tensor]:
    """The loss and both gradients by eager code in a wider type; every loss is a mean, so that rows come in parts."""
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (x.hidden, x.weight))
    head = None if x.teacher_weight is None else x.teacher_weight.to(dtype)
    total, size = torch.zeros((), dtype=dtype, device=hidden.device), len(x.labels)
    rows = max(1, TRUTH_BYTES // (weight.shape[0] * dtype.itemsize))
    for n in range(0, size, rows):
        some = slice(n, n + rows)
        logits, states = (None if t is None else t[some].to(dtype) for t in (x.teacher_logits, x.teacher_hidden))
        part = Inputs(x.divergence, hidden[some], weight, x.labels[some], logits, states, head)
        loss = eager_loss(part) * (len(part.labels) / size)
        loss.backward()
        total += loss.detach()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [total, hidden.grad, weight.grad]


def verify(x: Inputs, loss: Callable[[Inputs], torch.Tensor], truth: Sequence[torch.Tensor], bound: float) -> None:
    """Loss and gradients.

    Raises:
        WrongResult: one of them is not the truth.
    """
    x.hidden.grad = x.weight.grad = None
    found = loss(x)
    found.backward()
    assert x.hidden.grad is not None
    assert x.weight.grad is not None
    hold(((a, b.double()) for a, b in zip((found.detach(), x.hidden.grad, x.weight.grad), truth)), bound)
    x.hidden.grad = x.weight.grad = None


def step(x: Inputs, loss: Callable[[Inputs], torch.Tensor]) -> Run:
    """Forward and backward from empty gradients, as a training step has it."""

    def run() -> None:
        x.hidden.grad = x.weight.grad = None
        loss(x).backward()

    return run


def products(x: Inputs) -> Run:
    """The floor: logits, both gradients, and the teacher's logits where it comes as hidden states, by torch.mm."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        if x.teacher_hidden is not None and x.teacher_weight is not None:
            torch.mm(x.teacher_hidden, x.teacher_weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.t(), hidden, out=grad_weight)

    return run


def products_as_ours(x: Inputs) -> Run:
    """The same products through the library calls that the op makes, all rows at once."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)

    def run() -> None:
        if x.teacher_hidden is not None and x.teacher_weight is not None:
            gemm.logits(x.teacher_hidden, x.teacher_weight, None)
        logits = gemm.logits(hidden, weight, None).to(hidden.dtype)
        gemm.hidden_grad(logits, weight, grad_hidden)
        gemm.add_weight_grad(grad_weight, logits, hidden, first=True)

    return run


def losses(x: Inputs, names: Sequence[str]) -> dict[str, Callable[[Inputs], torch.Tensor]]:
    """Of those of the names that are losses and can run here."""
    made: dict[str, Callable[[Inputs], torch.Tensor]] = {}
    for name in names:
        if name == "effkern":
            made[name] = effkern_loss
        elif name in CHUNKS:
            made[name] = partial(effkern_loss, chunk_bytes=CHUNKS[name] << 20)
        elif name == "eager":
            made[name] = eager_loss
        elif name == "torch.compile":
            made[name] = partial(eager_loss, plain=torch.compile(partial(handwritten.loss, x.divergence)))
        elif name == LIGER_NAME:
            liger = liger_loss(x.divergence)
            if isinstance(liger, str):
                print(f"left out: {liger}", file=sys.stderr)
            else:
                made[name] = liger
    return made


def variants(x: Inputs, names: Sequence[str]) -> dict[str, Run]:
    """Each loss is checked against eager code in float32 on these inputs before it may be timed on them."""
    chosen = losses(x, names)
    if chosen:
        truth = truth_of(x, torch.float32)
        dtype = str(x.hidden.dtype).removeprefix("torch.")
        for loss in chosen.values():
            verify(x, loss, truth, bound_of(dtype))
    floors = {"products": products, "products as in effkern": products_as_ours}
    return {
        name: floors[name](x) if name in floors else step(x, chosen[name]) for name in names if name in floors | chosen
    }


def check(case: Case) -> None:
    """The loss and both gradients of a few rows against eager in float64, whole and in several chunks."""
    x = inputs_of({**case, "rows": min(case["rows"], CHECK_ROWS)})
    truth = truth_of(x, torch.float64)
    for chunk_bytes in (None, 4 * case["vocab"] * max(1, len(x.labels) // 3)):
        verify(x, partial(effkern_loss, chunk_bytes=chunk_bytes), truth, bound_of(case["dtype"]))


def tiles(rows: int, dim: int, vocab: int, rounds: int) -> None:
    """The products of one chunk: torch.mm over tiles of the vocabulary, and oneDNN."""
    hidden, weight, out = torch.randn(rows, dim), torch.randn(vocab, dim), torch.empty(rows, vocab)

    def tiled(width: int) -> Callable[[], None]:
        def run() -> None:
            for v in range(0, vocab, width):
                torch.mm(hidden, weight[v : v + width].t(), out=out[:, v : v + width])

        return run

    cases: dict[str, Callable[[], object]] = {f"{w} columns": tiled(w) for w in (500, 1000, gemm.CPU_TILE, 4000, 8000)}
    cases["oneDNN"] = lambda: gemm._onednn_linear(hidden, weight)
    if gemm.uses_f32_kernel(hidden):
        cases["effkern"] = lambda: gemm.logits(hidden, weight, out)
    cases["hidden gradient"] = lambda: torch.mm(out, weight)
    cases["hidden gradient, oneDNN"] = lambda: gemm._onednn_linear(out, weight.t())
    print(runner.table(runner.interleave({"one product": tiled(vocab), **cases}, rounds), "one product", {}))


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    given = [name for name in names if name != LIGER_NAME or case["case"] == "hidden"]
    return Prepared(variants(inputs_of(case), given))


def work(case: Case) -> Work:
    """Three products, four with the teacher's; operands and both gradients, each once."""
    rows, dim, vocab, e = case["rows"], case["dim"], case["vocab"], item_bytes(case["dtype"])
    wide = case["teacher_dim"] if case["case"] == "hidden" else 0
    moved = 2 * (rows + vocab) * dim + (rows + vocab) * wide + (rows * vocab if case["case"] == "logits" else 0)
    return Work(moved * e + 8 * rows, 2.0 * rows * vocab * (3 * dim + wide), case["dtype"])


def why(case: Case) -> list[str]:
    """The cost model's choice."""
    kinds = {"logits": "logits", "hidden": "hidden", "hard": "none"}
    e = item_bytes(case["dtype"])
    problem = cost.Problem(
        case["rows"], case["vocab"], case["dim"], kinds[case["case"]],  # type: ignore[arg-type]
        case["teacher_dim"] if case["case"] == "hidden" else 0, e, e, teacher_logit_bytes=e,
        passes=3 if DIVERGENCES[case["divergence"]].parameters else 2,
    )  # fmt: skip
    chosen = cost.plan(problem, ceilings.of_device(torch.device(case["device"])))
    return [f"cost model (effkern bench distill --explain): {chosen.method}, {chosen.num_chunks} x {chosen.rows} rows"]


def huge() -> Huge:
    """More than 2^31 teacher logits, cross entropy and gradients; the last rows must be what they are alone."""
    vocab, dim = 32000, 16
    rows = (1 << 31) // vocab // 8 * 8 + 64

    def run() -> None:
        case = {"divergence": "forward_kl", "case": "hard", "rows": rows, "dim": dim, "vocab": vocab, "teacher_dim": 0,
                "dtype": "float32", "device": "cpu"}  # fmt: skip
        x = inputs_of(case)
        logits = (torch.randn(64, vocab) * 2).bfloat16()
        x.teacher_logits = logits.expand(rows // 64, 64, vocab).reshape(-1, vocab)
        x.hidden, x.labels = x.hidden.detach()[: x.teacher_logits.shape[0]], x.labels[: x.teacher_logits.shape[0]]

        def statistics(n: int) -> torch.Tensor:
            teacher = TeacherLogits(x.teacher_logits[-n:])  # type: ignore[index]
            with torch.no_grad():
                return linear_distill_loss(
                    x.hidden[-n:], x.weight.detach(), x.labels[-n:], teacher=teacher, omega=OMEGA, temperature=1.0,
                    teacher_temperature=1.0,
                ).stats.divergence[-64:]  # fmt: skip

        if not torch.allclose(statistics(x.hidden.shape[0]), statistics(64), rtol=1e-4, atol=1e-5):
            raise WrongResult("wrong result in the last rows")

    return Huge(rows * vocab * 2 + (512 << 20), f"{rows} x {vocab} bfloat16 teacher logits, forward", run)


def print_tiles(a: argparse.Namespace) -> bool:
    if a.tiles:
        tiles(256, a.dim[0], a.vocab[0], a.rounds)
    return a.tiles


AXES = (
    Axis("divergence", "--divergence", ("forward_kl",), list(DIVERGENCES)),
    Axis("case", "--case", ("logits",), ("logits", "hidden", "hard")),
    Axis("rows", "--rows", (1024,)),
    Axis("dim", "--dim", (512,)),
    Axis("teacher_dim", "--teacher-dim", (512,)),
    Axis("vocab", "--vocab", (32000,)),
    Axis("dtype", "--dtype", ("float32",), ("float32", "bfloat16")),
)
SMALL = {"divergence": "forward_kl", "case": "logits", "dim": 128, "teacher_dim": 128, "dtype": "float32"}
OP = Op(
    name="distill",
    doc=__doc__,
    axes=AXES,
    variants=("products", "products as in effkern", "effkern", LIGER_NAME, "torch.compile", "eager", *CHUNKS),
    check=check,
    prepare=prepare,
    work=work,
    floor={"products": 1.0},
    optional=tuple(CHUNKS),
    registry=("linear_distill_loss",),
    why=why,
    options=lambda parser: parser.add_argument("--tiles", action="store_true"),
    instead=print_tiles,
    memory=True,
    scaling=(
        Scaling("rows", (64, 128, 256, 512, 1024), {**SMALL, "vocab": 8000}, "1: every row costs the same"),
        Scaling("vocab", (2000, 4000, 8000, 16000, 32000), {**SMALL, "rows": 256}, "1: every entry costs the same"),
    ),
    huge=huge,
)

if __name__ == "__main__":
    harness.main(OP)
