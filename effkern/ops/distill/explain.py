"""The cost model as a text table: what each way of computing the loss would cost, and which one is chosen.

effkern bench distill --explain --rows 8192 --vocab 128256 --dim 4096 --teacher-dim 4096 --dtype bf16 --device h100
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from effkern.ops.distill import ceilings, cost, fused_cost
from effkern.ops.distill.ceilings import Ceilings
from effkern.ops.distill.cost import METHODS, UNIVERSAL, Plan, Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def explain(
    p: Problem,
    device: Ceilings | None = None,
    *,
    budget: int | None = None,
    chunk_bytes: int | None = None,
    fused: bool = False,
) -> str:
    """The table for `p`; `fused` adds the ways that keep the logit tile on chip. Arguments as for `cost.plan`."""
    found = cost.candidates(p, device, budget, chunk_bytes, METHODS)
    chosen = cost.choose([x for x in found if budget is not None or x.method in UNIVERSAL])
    lines = [
        f"{p.num_rows} rows x {p.vocab} entries, hidden size {p.dim}, teacher {p.teacher}"
        f"{f' (hidden size {p.teacher_dim})' if p.teacher_dim else ''}, {8 * p.element_bytes}-bit products, "
        f"{p.passes} passes{', row on chip' if p.row_resident else ''}",
        _device_line(device, p.element_bytes),
        "",
        f"{'method':<12}{'rows':>7}{'columns':>9}{'chunks':>8}{'TFLOP':>8}{'GB':>9}{'B/entry':>9}{'peak MiB':>10}"
        f"{'ms':>9}{'at most':>9}",
    ]
    lines += [_line(p, x, "<- chosen" if x is chosen else _note(x)) for x in found]
    lines += [
        "",
        f"kernels of the chosen plan ({'GB alone' if device is None else 'the larger of both times counts'}):",
    ]
    for kernel in chosen.kernels:
        text = f"  {kernel.name:<26}{kernel.flops / 1e12:>8.2f} TFLOP{kernel.bytes / 1e9:>9.2f} GB"
        if device is not None and p.element_bytes in device.matrix:
            compute, memory = kernel.times(device, p.element_bytes)
            text += f"{compute * 1e3:>9.2f} ms products{memory * 1e3:>9.2f} ms memory"
        lines.append(text)
    if fused:
        lines += ["", *fused_cost.table(p, device, chosen)]
    return "\n".join(lines)


def _device_line(device: Ceilings | None, element_bytes: int) -> str:
    if device is None or element_bytes not in device.matrix:
        return "rates of the device not known: bytes decide"
    rates = f"{device.matrix[element_bytes] / 1e12:.3g} TFLOP/s, {device.bandwidth / 1e12:.3g} TB/s"
    return f"{device.name}: {rates} reachable, predicted and not measured"


def _note(x: Plan) -> str:
    notes = [] if x.fits else ["too large"]
    return ", ".join(notes + ([] if x.method in UNIVERSAL else ["only with memory_limit"]))


def _line(p: Problem, x: Plan, note: str) -> str:
    entries = max(1, p.num_rows * p.vocab)
    ms, most = ("-" if s is None else f"{s * 1e3:.2f}" for s in (x.seconds, x.seconds_apart))
    return (
        f"{x.method:<12}{x.rows:>7}{x.columns:>9}{x.num_chunks:>8}{x.flops / 1e12:>8.2f}{x.bytes / 1e9:>9.2f}"
        f"{x.bytes / entries:>9.1f}{x.peak_bytes / 2**20:>10.0f}{ms:>9}{most:>9}  {note}"
    ).rstrip()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="effkern bench distill --explain", description=__doc__.splitlines()[0])
    parser.add_argument("--explain", action="store_true", help="print this table instead of timing")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--teacher", choices=["none", "logits", "hidden", "sparse"])
    parser.add_argument("--teacher-dim", type=int, default=0, help="hidden size of a teacher given by hidden states")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the products")
    parser.add_argument("--weight-grad", choices=list(DTYPES), help="of the returned weight gradient; default --dtype")
    parser.add_argument("--device", choices=[*ceilings.KNOWN, "cpu"], default="h100")
    parser.add_argument("--measure", action="store_true", help="measure the machine at hand instead (about a second)")
    parser.add_argument("--passes", type=int, choices=[2, 3], default=2, help="class of the divergence")
    parser.add_argument("--row-on-chip", action="store_true", help="a row pass that reads its row once")
    parser.add_argument("--budget-mib", type=int, help="beyond inputs and returned gradients")
    parser.add_argument("--chunk-mib", type=int, help="of one V-wide float32 buffer")
    parser.add_argument("--fused", action="store_true", help="also kernels that keep the logit tile on chip")
    a = parser.parse_args(list(arguments))
    dtype = DTYPES[a.dtype]
    problem = Problem(
        a.rows, a.vocab, a.dim, a.teacher or ("hidden" if a.teacher_dim else "none"), a.teacher_dim, dtype.itemsize,
        DTYPES[a.weight_grad or a.dtype].itemsize, passes=a.passes, row_resident=a.row_on_chip,
    )  # fmt: skip
    if a.dtype == "fp16":
        # The op returns such a gradient in float32, lest it underflows.
        problem = replace(problem, weight_grad_bytes=4)
    device: Ceilings | None
    if a.measure:
        device = ceilings.measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    else:
        device = ceilings.of_device(torch.device("cpu")) if a.device == "cpu" else ceilings.known(a.device)
    mib = 2**20
    print(
        explain(
            problem,
            device,
            budget=a.budget_mib and a.budget_mib * mib,
            chunk_bytes=a.chunk_mib and a.chunk_mib * mib,
            fused=a.fused,
        )
    )
    return 0
