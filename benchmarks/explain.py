"""What a case needs, what that takes on this machine, and what the op chooses: python -m benchmarks OP --explain"""

from collections.abc import Sequence

import torch

from benchmarks import ceilings
from benchmarks.case import Case, Op
from benchmarks.harness import title
from effkern.ops import registry


def choice(name: str, device: torch.device) -> list[str]:
    """The implementation that impl="auto" takes, and why not those before it."""
    lines: list[str] = []
    for implementation in registry.registered()[name]:
        reason = implementation.unavailable(device)
        if reason is None:
            after = registry.registered()[name]
            left = [i.name for i in after[after.index(implementation) + 1 :]]
            order = "the first of its order that runs here" + (f"; after it {', '.join(left)}" if left else "")
            return [f"  {name} takes {implementation.name}: {order}", *lines]
        lines.append(f"    not {implementation.name}: {reason}")
    raise AssertionError(f"{name} has no implementation for {device}; the reference runs anywhere")


def explain(op: Op, cases: Sequence[Case]) -> None:
    """Bytes, FLOPs and the roofline's prediction from ceilings measured now; then the op's choices."""
    device = torch.device(cases[0]["device"])
    dtypes = sorted({op.work(case).dtype for case in cases if op.work(case).flops})
    found = ceilings.Ceilings(ceilings.measure(device, [torch.get_num_threads()], dtypes))
    threads = torch.get_num_threads()
    for line in found.text(device.type, threads):
        print(line)
    for case in cases:
        work = op.work(case)
        print(f"\n{op.name}: {title(case)}")
        bound = found.bound(work, device.type, threads)
        parts = [f"  {work.bytes / 1e6:.4g} MB", f"{work.flops / 1e9:.4g} GFLOP {work.dtype} in matrix products"]
        print(", ".join(parts))
        assert bound is not None
        print(f"  predicted: {bound.seconds * 1e3:.4g} ms at the least, bound by {bound.by}", end="")
        print(f" (memory {bound.memory * 1e3:.4g} ms, products {bound.products * 1e3:.4g} ms)")
        for name in op.registry:
            print("\n".join(choice(name, device)))
        for line in op.why(case):
            print(f"  {line}")
