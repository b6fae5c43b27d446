"""linear_distill_loss, forward and backward, beside the bare matrix products, eager, torch.compile and Liger.

    python -m benchmarks.ops.distill                     teacher logits given (three products)
    python -m benchmarks.ops.distill --case hidden       the teacher's output layer inside (four products)
    python -m benchmarks.ops.distill --case hard         no teacher: cross entropy alone
    python -m benchmarks.ops.distill --divergence jsd    another divergence
    python -m benchmarks.ops.distill --tiles             the products of one chunk, by tile width and library

The floor is the matrix products alone by torch.mm, into buffers that exist, all rows at once. The op itself calls a
faster library for two of them; the second line is the floor with those calls.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch

from benchmarks import handwritten
from benchmarks.handwritten import OMEGA, PARAMETERS
from effkern import TeacherHidden, TeacherLogits, linear_distill_loss
from effkern.ops.distill import gemm
from effkern.ops.distill.rows import DIVERGENCES

CHECK_ROWS = 64
# The loss in chunks of other sizes than its own.
CHUNKS = {f"{mib} MiB": mib for mib in (8, 16, 32, 64, 128)}
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
    hidden = torch.randn(rows, dim, device=device).to(dtype)
    weight = (torch.randn(vocab, dim, device=device) * 2 / dim**0.5).to(dtype)
    logits = torch.randn(rows, vocab, device=device).to(dtype) * 2 if case == "logits" else None
    states = torch.randn(rows, teacher_dim, device=device).to(dtype) if case == "hidden" else None
    head = (
        (torch.randn(vocab, teacher_dim, device=device) * 2 / teacher_dim**0.5).to(dtype) if case == "hidden" else None
    )
    labels = torch.randint(0, vocab, (rows,), device=device)
    return Inputs(divergence, hidden.requires_grad_(), weight.requires_grad_(), labels, logits, states, head)


def effkern_loss(x: Inputs, chunk_mib: int | None = None) -> torch.Tensor:
    teacher: TeacherLogits | TeacherHidden | None = None
    if x.teacher_logits is not None:
        teacher = TeacherLogits(x.teacher_logits)
    elif x.teacher_hidden is not None and x.teacher_weight is not None:
        teacher = TeacherHidden(x.teacher_hidden, x.teacher_weight)
    omega, t = (None, None) if teacher is None else (OMEGA, 1.0)
    needed: dict[str, Any] = {name: PARAMETERS[name] for name in DIVERGENCES[x.divergence].parameters}
    return linear_distill_loss(
        x.hidden, x.weight, x.labels, teacher=teacher, omega=omega, temperature=t, teacher_temperature=t,
        divergence=x.divergence, chunk_bytes=chunk_mib and chunk_mib << 20, **needed,
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


def step(x: Inputs, loss: Callable[[Inputs], torch.Tensor]) -> Callable[[], None]:
    """Forward and backward from empty gradients, as a training step has it."""

    def run() -> None:
        x.hidden.grad = x.weight.grad = None
        loss(x).backward()

    return run


def products(x: Inputs) -> Callable[[], None]:
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


def products_as_ours(x: Inputs) -> Callable[[], None]:
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


def variants(x: Inputs, names: list[str]) -> dict[str, Callable[[], None]]:
    made: dict[str, Callable[[], None]] = {}
    for name in names:
        if name == "products":
            made[name] = products(x)
        elif name == "products as in effkern":
            made[name] = products_as_ours(x)
        elif name == "effkern":
            made[name] = step(x, effkern_loss)
        elif name in CHUNKS:
            made[name] = step(x, partial(effkern_loss, chunk_mib=CHUNKS[name]))
        elif name == "eager":
            made[name] = step(x, eager_loss)
        elif name == "torch.compile":
            compiled = torch.compile(partial(handwritten.loss, x.divergence))
            made[name] = step(x, lambda x, c=compiled: eager_loss(x, c))  # type: ignore[misc]
        elif name == "liger chunked (compiled)":
            liger = liger_loss(x.divergence)
            if isinstance(liger, str):
                print(f"left out: {liger}", file=sys.stderr)
            else:
                made[name] = step(x, liger)
    return made


def check(x: Inputs) -> None:
    """No number on a wrong result: the loss and both gradients of the first rows against eager in float64."""

    def copy(wide: bool) -> Inputs:
        def one(t: torch.Tensor | None, rows: int | None = CHECK_ROWS) -> torch.Tensor | None:
            if t is None:
                return None
            part = t.detach()[:rows].clone()
            return part.double() if wide and part.is_floating_point() else part

        hidden, weight, labels = one(x.hidden), one(x.weight, None), one(x.labels)
        assert hidden is not None
        assert weight is not None
        assert labels is not None
        teacher = one(x.teacher_logits), one(x.teacher_hidden), one(x.teacher_weight, None)
        return Inputs(x.divergence, hidden.requires_grad_(), weight.requires_grad_(), labels, *teacher)

    narrow, wide = copy(wide=False), copy(wide=True)
    loss, truth = effkern_loss(narrow), eager_loss(wide)
    loss.backward()
    truth.backward()
    bound = 1e-5 if x.hidden.dtype == torch.float32 else 2e-2
    pairs = ((loss, truth), (narrow.hidden.grad, wide.hidden.grad), (narrow.weight.grad, wide.weight.grad))
    for got, want in pairs:
        assert got is not None
        assert want is not None
        error = ((got.double() - want).norm() / want.norm()).item()
        if not error <= bound:
            raise SystemExit(f"wrong result: relative error {error:.1e} > {bound:.0e}; nothing is timed")


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


CASE = ("divergence", "case", "rows", "dim", "teacher_dim", "vocab", "dtype", "device")


def peak_mib(variant: str, case: dict, threads: int) -> float:
    """Memory of one variant beyond inputs and gradients, in a process of its own."""
    options = [f"--{name.replace('_', '-')}={case[name]}" for name in CASE]
    command = (*options, f"--threads={threads}", f"--peak-of={variant}")
    return int(runner.in_fresh_process("benchmarks.ops.distill", *command)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["logits", "hidden", "hard"], default="logits")
    parser.add_argument("--divergence", choices=list(DIVERGENCES), default="forward_kl")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--teacher-dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.device == "cpu":
        torch.set_num_threads(a.threads)
    if a.tiles:
        return tiles(256, a.dim, a.vocab, a.rounds)
    shape = (a.divergence, a.case, a.rows, a.dim, a.vocab, a.teacher_dim, getattr(torch, a.dtype), a.device)
    if a.peak_of:
        print(runner.peak_memory(lambda: variants(make(*shape), [a.peak_of])[a.peak_of]))
        return None

    case = {name: getattr(a, name) for name in CASE}
    names = ["products", "products as in effkern", "effkern", "torch.compile", "eager"]
    if a.case == "hidden":
        names.insert(3, "liger chunked (compiled)")
    x = make(*shape)
    check(x)
    runs = variants(x, names)
    timings = runner.interleave(runs, a.rounds)
    extra: dict[str, dict] = {}
    if a.device == "cpu" and not a.no_memory:
        for name in runs:
            if not name.startswith("products"):
                extra[name] = {"peak_mib": peak_mib(name, case, a.threads)}
    if a.device != "cpu":
        extra = {name: {"peak_mib": runner.peak_device_memory(run) / 2**20} for name, run in runs.items()}
    if a.json:
        print("\n".join(runner.result_lines("distill", case, timings, extra)))
    else:
        print(json.dumps({**case, **runner.machine()}))
        print(runner.table(timings, "products", extra))
        print("peak: memory beyond the inputs and the two gradients")
    return None


if __name__ == "__main__":
    main()
