"""The bfloat16 products of effkern._C with float32 results beside torch.mm, which rounds its results to bfloat16.

    python -m benchmarks.ops.gemm_bf16                                    logits and weight gradient of one chunk
    python -m benchmarks.ops.gemm_bf16 --rows 255 --dims 511 --vocab 31999
    python -m benchmarks.ops.gemm_bf16 --kernel avx512_bf16               not the fastest that this CPU runs

"cpu x" is the ratio of process CPU time to torch.mm's. "widened" is what the loss does where
the CPU does not multiply bfloat16. "add" adds to a float32 total, "first" overwrites it.
"""

from collections.abc import Sequence

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness  # isort: skip

import torch

from benchmarks.case import Axis, Case, Op, Prepared, Run, Scaling, Work, hold
from benchmarks.runner import Skip
from effkern.ops.distill import gemm, gemm_schema

OPS = torch.ops.effkern
KERNELS = [name for name in gemm_schema.KERNELS if name != "none"]


def widened(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """The way of gemm.logits without the kernel."""
    wide = hidden.float()
    for v in range(0, weight.shape[0], gemm.CPU_TILE):
        out[:, v : v + gemm.CPU_TILE] = gemm._onednn_linear(wide, weight[v : v + gemm.CPU_TILE].float())


def add_rounded(total: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """The way of gemm.add_weight_grad without the kernel."""
    for v in range(0, total.shape[0], gemm.CPU_TILE):
        total[v : v + gemm.CPU_TILE] += torch.mm(grad[:, v : v + gemm.CPU_TILE].t(), hidden)


def choose(case: Case) -> None:
    if not gemm_schema.bf16_gemm():
        raise Skip("effkern._C is not built, or this CPU does not multiply bfloat16 (AVX512-BF16)")
    if case["kernel"] != gemm_schema.kernel():
        gemm_schema.choose(case["kernel"])


def check(case: Case) -> None:
    """Both products at odd sizes against float64, the gradient also on top of a total."""
    choose(case)
    torch.manual_seed(0)
    rows, vocab, dim = 33, 1999, 130
    hidden, weight, grad = (torch.randn(*s).bfloat16() for s in ((rows, dim), (vocab, dim), (rows, vocab)))
    out, total = torch.empty(rows, vocab), torch.empty(vocab, dim)
    OPS.bf16_mm_nt_(out, hidden, weight)
    OPS.bf16_add_tn_(total, grad, hidden, True)
    found = grad.t().double() @ hidden.double()
    hold(((out, hidden.double() @ weight.t().double()), (total, found)), 1e-6)
    before = torch.randn(vocab, dim)
    more = before.clone()
    OPS.bf16_add_tn_(more, grad, hidden, False)
    hold([(more, before.double() + found)], 1e-6)


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    choose(case)
    torch.manual_seed(0)
    rows, dim, vocab = case["rows"], case["dim"], case["vocab"]
    hidden, weight = torch.randn(rows, dim).bfloat16(), torch.randn(vocab, dim).bfloat16()
    out, total = torch.zeros(rows, vocab), torch.zeros(vocab, dim)
    narrow_out, narrow_total = out.bfloat16(), total.bfloat16()
    # As the row pass leaves it: the first half of float32 rows.
    grad = torch.randn(rows, vocab).view(torch.bfloat16)[:, :vocab]
    grad.copy_(torch.randn(rows, vocab))
    runs: dict[str, Run] = {
        "torch.mm, logits": lambda: torch.mm(hidden, weight.t(), out=narrow_out),
        "logits": lambda: OPS.bf16_mm_nt_(out, hidden, weight),
        "logits, widened": lambda: widened(out, hidden, weight),
        "torch.mm, gradient": lambda: torch.mm(grad.t(), hidden, out=narrow_total),
        "first": lambda: OPS.bf16_add_tn_(total, grad, hidden, True),
        "add": lambda: OPS.bf16_add_tn_(total, grad, hidden, False),
        "add, rounded": lambda: add_rounded(total, grad, hidden),
    }
    return Prepared({name: runs[name] for name in names})


def work(case: Case) -> Work:
    """Of the logits, in float32."""
    rows, dim, vocab = case["rows"], case["dim"], case["vocab"]
    return Work(2 * (rows + vocab) * dim + 4 * rows * vocab, 2.0 * rows * dim * vocab, "bfloat16")


def works(case: Case) -> dict[str, Work | None]:
    rows, dim, vocab, w = case["rows"], case["dim"], case["vocab"], work(case)
    read = 2 * rows * (dim + vocab)
    first, add = (Work(read + 4 * n * vocab * dim, w.flops, w.dtype) for n in (1, 2))
    narrow = Work(2 * ((rows + vocab) * dim + rows * vocab), w.flops, w.dtype)
    return {"torch.mm, logits": narrow, "torch.mm, gradient": Work(read + 2 * vocab * dim, w.flops, w.dtype),
            "first": first, "add": add, "add, rounded": add}  # fmt: skip


def floor(variant: str) -> dict[str, float]:
    return {"torch.mm, logits" if "logits" in variant else "torch.mm, gradient": 1.0}


def why(case: Case) -> list[str]:
    return [f"kernel {case['kernel']}: the fastest of {', '.join(KERNELS)} that this CPU runs, or what --kernel says"]


OP = Op(
    name="gemm_bf16",
    doc=__doc__,
    axes=(
        Axis("kernel", "--kernel", (gemm_schema.kernel(),), KERNELS),
        Axis("rows", "--rows", (256, 512, 1024)),
        Axis("dim", "--dims", (256, 512, 768, 2048)),
        Axis("vocab", "--vocab", (32000,)),
    ),
    variants=("torch.mm, logits", "logits", "logits, widened", "torch.mm, gradient", "first", "add", "add, rounded"),
    check=check,
    prepare=prepare,
    work=work,
    works=works,
    floor=floor,
    ours="logits",
    why=why,
    devices=("cpu",),
    rounds=5,
    threads=1,
    scaling=(
        Scaling("dim", (64, 128, 256, 512, 1024), {"rows": 256, "vocab": 4000}, "1: FLOPs, less where results bound"),
    ),
    no_huge="the loss takes it in chunks of at most 32 MiB",
)


if __name__ == "__main__":
    harness.main(OP)
