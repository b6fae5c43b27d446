"""What a fully fused head would cost: kernels in which the logit tile never leaves the multiprocessor.

Such kernels pay for the traffic they save with logits computed again, with products slower than the vendor library's,
with operands that every tile reads from the second-level cache, and with exponentials that nothing hides. The rates
are assumptions, stated here; nothing was measured on a GPU.
"""

from dataclasses import dataclass, replace

from effkern.ops.distill.ceilings import Ceilings
from effkern.ops.distill.cost import Kernel, Plan, Problem

# Products inside a Triton kernel with such an epilogue, beside the vendor library's.
PRODUCT_SHARE = 0.8

# Rows and columns of a logit tile: the largest that compiles without spills (fused_head.LAUNCH).
TILE = (128, 128)

# Bandwidth of the second-level cache over that of the memory.
CACHE_OVER_MEMORY = 2.0

# Lane instructions per entry of the logit tile: the exponential at an eighth of the rate, maximum, sum, comparisons.
STATISTICS_OPS, GRADIENT_OPS = 16, 13


@dataclass(frozen=True)
class FusedKernel(Kernel):
    """`entries` logit tile entries with `ops` lane instructions each, on top of the products; `tile_bytes` of operands
    come from the cache."""

    entries: float = 0.0
    ops: int = 0
    tile_bytes: float = 0.0

    def times(self, device: Ceilings, element_bytes: int) -> tuple[float, float]:
        assert device.vector is not None
        products = self.flops / (device.matrix[element_bytes] * PRODUCT_SHARE)
        operands = self.tile_bytes / (device.bandwidth * CACHE_OVER_MEMORY)
        return max(products, operands) + self.entries * self.ops / device.vector, self.bytes / device.bandwidth

    def best_seconds(self, device: Ceilings, element_bytes: int) -> float:
        """With products as fast as the vendor library's and operands for nothing: a lower bound."""
        ideal = replace(self, flops=self.flops * PRODUCT_SHARE, tile_bytes=0.0)
        return ideal.seconds(device, element_bytes)


def _tile_bytes(p: Problem) -> float:
    """Operands of all logit tiles."""
    return p.num_rows * p.vocab * p.element_bytes * (p.dim + p.teacher_dim) * (1 / TILE[0] + 1 / TILE[1])


def statistics(p: Problem) -> FusedKernel:
    """lse, label logit and rank of each row."""
    both = p.dim + p.teacher_dim
    moved = p.element_bytes * (p.vocab + p.num_rows) * both
    entries = p.num_rows * p.vocab
    heads = 2 if p.teacher_dim else 1
    return FusedKernel("fused statistics", 2 * entries * both, moved, entries, heads * STATISTICS_OPS, _tile_bytes(p))


def chunked_statistics(p: Problem) -> tuple[Kernel, ...]:
    """The same by the vendor library's product and one read of the logits; weights once, as rows are many."""
    both, entries = p.dim + p.teacher_dim, p.num_rows * p.vocab
    heads = 2 if p.teacher_dim else 1
    moved = p.element_bytes * (p.vocab + p.num_rows) * both + heads * p.logit_bytes * entries
    read = p.logit_bytes + p.teacher_bytes
    return Kernel("logits", 2 * entries * both, moved), Kernel("one read", 0, entries * read)


def fully_fused(p: Problem) -> tuple[Kernel, ...]:
    """Statistics, then one kernel per gradient that computes the logits again: 10 D + 6 Dt FLOPs per entry."""
    both, entries = p.dim + p.teacher_dim, p.num_rows * p.vocab
    heads = 2 if p.teacher_dim else 1
    moved = p.element_bytes * (p.vocab + p.num_rows) * both
    flops = 2 * entries * both + 2 * entries * p.dim
    # The second product of a tile has an operand on chip, and its result in registers or the cache.
    tile = (entries, heads * GRADIENT_OPS, _tile_bytes(p))
    return (
        statistics(p),
        FusedKernel("fused hidden gradient", flops, moved + p.element_bytes * p.num_rows * p.dim, *tile),
        FusedKernel("fused weight gradient", flops, moved + p.weight_grad_bytes * p.vocab * p.dim, *tile),
    )


def fused_logit_gradient(p: Problem) -> tuple[Kernel, ...]:
    """Statistics, the logit gradient from logits computed again, and the library's two products over all rows:
    the gradient is all that is V-wide, 8 D + 4 Dt FLOPs per entry."""
    both, entries, e = p.dim + p.teacher_dim, p.num_rows * p.vocab, p.element_bytes
    heads = 2 if p.teacher_dim else 1
    weights, hidden = p.vocab * p.dim, p.num_rows * p.dim
    moved = e * (p.vocab + p.num_rows) * both + e * entries
    return (
        statistics(p),
        FusedKernel("fused logit gradient", 2 * entries * both, moved, entries, heads * GRADIENT_OPS, _tile_bytes(p)),
        Kernel("hidden gradient", 2 * entries * p.dim, e * (entries + weights + hidden)),
        Kernel("weight gradient", 2 * entries * p.dim, e * (entries + hidden) + p.weight_grad_bytes * weights),
    )


def table(p: Problem, device: Ceilings | None, chosen: Plan) -> list[str]:
    """Both comparisons: statistics alone, and the loss with its gradients."""
    if p.teacher == "logits" or p.passes != 2:
        return ["fused: a teacher given by logits, or a third pass, leaves nothing to fuse"]
    if device is None or device.vector is None or p.element_bytes not in device.matrix or chosen.seconds is None:
        return ["fused: rates of the device not known"]
    rows = {
        "statistics, as chunked": chunked_statistics(p),
        "statistics, fused": (statistics(p),),
        "with gradients, as chosen": chosen.kernels,
        "with gradients, all fused": fully_fused(p),
        "with gradients, g from fused logits": fused_logit_gradient(p),
    }
    lines = [f"{'logit tile on chip':<38}{'TFLOP':>8}{'GB':>9}{'ms':>9}{'at best':>9}{'of first':>10}"]
    first, e = 0.0, p.element_bytes
    for name, kernels in rows.items():
        seconds = sum(k.seconds(device, e) for k in kernels)
        best = sum(k.best_seconds(device, e) if isinstance(k, FusedKernel) else k.seconds(device, e) for k in kernels)
        if "fused" not in name:
            first = seconds
        flops, moved = sum(k.flops for k in kernels), sum(k.bytes for k in kernels)
        lines.append(
            f"{name:<38}{flops / 1e12:>8.2f}{moved / 1e9:>9.2f}{seconds * 1e3:>9.2f}{best * 1e3:>9.2f}"
            f"{seconds / first:>10.2f}"
        )
    return lines
