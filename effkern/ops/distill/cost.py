"""What the loss costs, and which way of computing it to choose: FLOPs, bytes moved, peak memory, time.

    N rows, C rows of a chunk, V vocabulary, B columns of a vocabulary chunk, D and Dt hidden sizes
    bytes: e of an element of the products, a of an accumulator, z of a logit, t of a teacher's entry as it is read,
    g of an entry of the logit gradient, w of an element of the returned weight gradient

Ways (methods) of computing the loss and both gradients:
    chunked    C rows at a time; the weight gradient is read and written once per chunk, in accumulators
    one_chunk  all rows at once; the weight gradient is written once, in its own type, and has no accumulators
    streamed   B columns at a time, twice: statistics first, then the logits again and the gradients. The weight
               gradient is written once; the hidden gradient is accumulated. Two passes only.

Each kernel moves its operands once (caches hold what it reuses), and the kernels of one stream run one after another:
inside a kernel arithmetic and traffic overlap, between kernels nothing does. So the time of a kernel is the larger of
the two, and the time of the loss is the sum over its kernels. A product whose result is as large as the work of a
short chunk hides its stores badly, so the truth lies between this and the sum of both (`Plan.seconds_apart`).
Launches, and products too small to fill the device, are not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from effkern.ops.distill.ceilings import CPU_CHUNK_BYTES, Ceilings

Teacher = Literal["none", "logits", "hidden", "sparse"]
METHODS = ("chunked", "one_chunk", "streamed")
# Those that a call may take whatever its divergence and teacher are.
UNIVERSAL = METHODS[:2]

# The prediction is no better than this: within it, the smaller peak counts.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Problem:
    """One call of the loss. `passes` is the divergence's class: 2, or 3 where p and q must be normalised first."""

    num_rows: int
    vocab: int
    dim: int
    teacher: Teacher = "none"
    teacher_dim: int = 0
    element_bytes: int = 2
    weight_grad_bytes: int = 2
    logit_bytes: int = 4
    """4 unless logits are rounded (2) or products are in float64 (8)."""
    teacher_logit_bytes: int = 2
    passes: int = 2
    row_resident: bool = False
    """The row pass keeps its row on chip and reads it once."""
    grad_in_place: bool = False
    """The logit gradient takes the memory of the logits."""
    slice_buffers: int = 2
    """Float buffers of one slice's size that the row pass of `streamed` keeps beside logits and gradient."""

    def __post_init__(self) -> None:
        rules = {
            "num_rows": (self.num_rows >= 0, ">= 0"),
            "vocab": (self.vocab >= 1, ">= 1"),
            "dim": (self.dim >= 1, ">= 1"),
            "teacher": (self.teacher in ("none", "logits", "hidden", "sparse"), "none, logits, hidden or sparse"),
            "teacher_dim": ((self.teacher_dim > 0) == (self.teacher == "hidden"), "> 0 for a hidden teacher, else 0"),
            "passes": (self.passes in (2, 3), "2 or 3"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"plan: {name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def accumulator_bytes(self) -> int:
        return max(4, self.element_bytes)

    @property
    def teacher_bytes(self) -> int:
        return {"none": 0, "sparse": 0, "logits": self.teacher_logit_bytes, "hidden": self.logit_bytes}[self.teacher]

    @property
    def buffer_bytes(self) -> int:
        """Bytes per row and vocabulary entry that are alive at once: z, a hidden teacher's u, and g."""
        own_grad = not self.grad_in_place and self.element_bytes != self.logit_bytes
        teacher = self.logit_bytes if self.teacher == "hidden" else 0
        return self.logit_bytes + teacher + (self.element_bytes if own_grad else 0)

    @property
    def slice_bytes(self) -> int:
        """The same of a slice of the vocabulary, whose row pass is PyTorch's."""
        return self.buffer_bytes + self.slice_buffers * self.accumulator_bytes


@dataclass(frozen=True)
class Kernel:
    """All launches of one kind together."""

    name: str
    flops: float
    bytes: float

    def times(self, device: Ceilings, element_bytes: int) -> tuple[float, float]:
        """Seconds of the arithmetic alone, and of the traffic alone."""
        return self.flops / device.matrix[element_bytes], self.bytes / device.bandwidth

    def seconds(self, device: Ceilings, element_bytes: int) -> float:
        return max(self.times(device, element_bytes))


@dataclass(frozen=True)
class Plan:
    """One way of computing the loss. Times are None where the device's rates are not known."""

    method: str
    rows: int
    columns: int
    num_chunks: int
    flops: float
    bytes: float
    peak_bytes: int
    """Beyond the inputs and the returned gradients."""
    seconds: float | None
    seconds_apart: float | None
    """If nothing overlapped: an upper bound."""
    fits: bool
    kernels: tuple[Kernel, ...]


def row_chunks(p: Problem, rows: int) -> tuple[Kernel, ...]:
    """Kernels of `chunked` (and of `one_chunk`, where `rows` is N)."""
    n, v, d, e, a = p.num_rows, p.vocab, p.dim, p.element_bytes, p.accumulator_bytes
    chunks = max(1, -(-n // rows))
    weights, hidden, entries = e * v * d, e * n * d, n * v
    reads = 1 if p.row_resident else p.passes
    if chunks == 1:
        weight_grad = p.weight_grad_bytes * v * d
    else:
        # The first chunk has nothing to read.
        weight_grad = (2 * chunks - 1) * a * v * d
    kernels = [
        Kernel("logits", 2 * entries * d, chunks * weights + hidden + p.logit_bytes * entries),
        *_teacher_logits(p, 1, chunks, 1),
        Kernel("row pass", 0, entries * (reads * (p.logit_bytes + p.teacher_bytes) + e)),
        Kernel("hidden gradient", 2 * entries * d, e * entries + chunks * weights + hidden),
        Kernel("weight gradient", 2 * entries * d, e * entries + hidden + weight_grad),
    ]
    if chunks > 1 and p.weight_grad_bytes != a:
        kernels.append(Kernel("weight gradient, rounded", 0, (a + p.weight_grad_bytes) * v * d))
    return tuple(kernels)


def column_chunks(p: Problem, columns: int) -> tuple[Kernel, ...]:
    """Kernels of `streamed`."""
    n, v, d, e, a = p.num_rows, p.vocab, p.dim, p.element_bytes, p.accumulator_bytes
    chunks = -(-v // columns)
    weights, hidden, entries = e * v * d, e * n * d, n * v
    read = p.logit_bytes + p.teacher_bytes
    kernels = [
        Kernel("logits, twice", 4 * entries * d, 2 * (weights + chunks * hidden + p.logit_bytes * entries)),
        *_teacher_logits(p, 2, 1, chunks),
        Kernel("statistics", 0, entries * read),
        Kernel("row pass", 0, entries * (read + e)),
        Kernel("hidden gradient", 2 * entries * d, e * entries + weights + (2 * chunks - 1) * a * n * d),
        Kernel("weight gradient", 2 * entries * d, e * entries + chunks * hidden + p.weight_grad_bytes * v * d),
    ]
    if e != a:
        kernels.append(Kernel("hidden gradient, rounded", 0, (a + e) * n * d))
    return tuple(kernels)


def _teacher_logits(p: Problem, times: int, weight_reads: int, hidden_reads: int) -> tuple[Kernel, ...]:
    if p.teacher != "hidden":
        return ()
    per_row, entries = p.element_bytes * p.teacher_dim, p.num_rows * p.vocab
    moved = weight_reads * per_row * p.vocab + hidden_reads * per_row * p.num_rows + p.logit_bytes * entries
    return (Kernel("teacher logits", times * 2 * entries * p.teacher_dim, times * moved),)


def peak(p: Problem, method: str, size: int) -> int:
    """Bytes beyond the inputs and the returned gradients; `size` is C or B.

    The accumulators of a rounded gradient stand in its place while the chunks run, and beside it at the end.
    """
    a, rows = p.accumulator_bytes, size
    if method == "one_chunk":
        return p.buffer_bytes * p.num_rows * p.vocab
    if method == "chunked":
        buffers, grad, w = p.buffer_bytes * rows * p.vocab, p.vocab * p.dim, p.weight_grad_bytes
    else:
        buffers, grad, w = p.slice_bytes * p.num_rows * size, p.num_rows * p.dim, p.element_bytes
    return buffers if w == a else max(buffers + (a - w) * grad, a * grad)


def balanced(num_rows: int, most: int) -> int:
    """Rows per chunk, at most `most`, such that the last chunk is no remnant."""
    most = max(1, min(num_rows, most))
    return -(-num_rows // -(-num_rows // most)) if num_rows else most


def rule_rows(p: Problem, chunk_bytes: int) -> int:
    """At most this many rows per chunk: max(1024, 2 D) keep the traffic of the weights at 6 + Dt / D bytes per entry
    (bf16), if one V-wide buffer of them is within `chunk_bytes`."""
    allowed = aligned(chunk_bytes // (p.vocab * p.accumulator_bytes))
    return max(1, min(p.num_rows, max(1024, 2 * p.dim), allowed))


def aligned(rows: int) -> int:
    """Rounded down to whole tiles of a product."""
    return rows - rows % 32 if rows > 32 else max(1, rows)


def make(p: Problem, method: str, size: int, device: Ceilings | None, limit: float) -> Plan:
    """The plan of `method` in chunks of `size` rows or columns; it fits if its peak is within `limit`."""
    if method == "one_chunk":
        size = max(1, p.num_rows)
    by_column = method == "streamed"
    kernels = column_chunks(p, size) if by_column else row_chunks(p, size)
    seconds = apart = None
    if device is not None and p.element_bytes in device.matrix:
        seconds = sum(k.seconds(device, p.element_bytes) for k in kernels)
        apart = sum(sum(k.times(device, p.element_bytes)) for k in kernels)
    most = peak(p, method, size)
    return Plan(
        method,
        p.num_rows if by_column else size,
        size if by_column else p.vocab,
        -(-p.vocab // size) if by_column else max(1, -(-p.num_rows // size)),
        sum(k.flops for k in kernels),
        sum(k.bytes for k in kernels),
        most,
        seconds,
        apart,
        most <= limit,
        kernels,
    )


def candidates(
    p: Problem,
    device: Ceilings | None = None,
    budget: int | None = None,
    chunk_bytes: int | None = None,
    methods: Iterable[str] = UNIVERSAL,
) -> list[Plan]:
    """All plans to choose from, in order of preference where nothing else decides; see `plan`."""
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if device is None else device.chunk_bytes
    most = rule_rows(p, chunk_bytes)
    rule, all_in_one = balanced(p.num_rows, most), most >= p.num_rows
    limit = peak(p, "one_chunk" if all_in_one else "chunked", most) if budget is None else budget
    first = make(p, "one_chunk" if all_in_one else "chunked", rule, device, limit)
    if device is not None and device.is_cpu and first.fits:
        return [first]

    a, w, grad = p.accumulator_bytes, p.weight_grad_bytes, p.vocab * p.dim
    sizes = {rule}
    if budget is not None:
        # Rounding the accumulators takes their size, so that chunks may take what it leaves even if nothing fits.
        room = budget if w == a else max(budget, a * grad) - (a - w) * grad
        largest = aligned(room // (p.buffer_bytes * p.vocab))
        sizes |= {balanced(p.num_rows, rows) for rows in (2 * most, 4 * most, largest)}
    found: list[Plan] = []
    if "chunked" in methods:
        found += [make(p, "chunked", c, device, limit) for c in sorted(sizes) if c < p.num_rows]
    if "one_chunk" in methods:
        found.append(make(p, "one_chunk", p.num_rows, device, limit))
    if "streamed" in methods and p.passes == 2:
        room = limit - (a - p.element_bytes) * p.num_rows * p.dim
        columns = min(p.vocab // 2, room // max(1, p.slice_bytes * p.num_rows))
        columns -= columns % 128 if columns > 128 else 0
        if columns >= 1:
            found.append(make(p, "streamed", columns, device, limit))
    return found


def choose(found: list[Plan]) -> Plan:
    """The fastest that fits; of those within TOLERANCE of it the one with the smallest peak. If none fits, the
    smallest. Without times, the fewest FLOPs, and of them the fewest bytes, count as fastest."""
    fitting = [x for x in found if x.fits]
    if not fitting:
        return min(found, key=lambda x: (x.peak_bytes, x.bytes))
    if any(x.seconds is None for x in fitting):
        fewest = min(x.flops for x in fitting)
        fitting = [x for x in fitting if x.flops <= fewest * (1 + TOLERANCE)]

    def cost(x: Plan) -> float:
        return x.bytes if x.seconds is None else x.seconds

    fastest = min(map(cost, fitting))
    return min((x for x in fitting if cost(x) <= fastest * (1 + TOLERANCE)), key=lambda x: (x.peak_bytes, cost(x)))


def plan(
    p: Problem,
    device: Ceilings | None = None,
    *,
    budget: int | None = None,
    chunk_bytes: int | None = None,
    methods: Iterable[str] = UNIVERSAL,
) -> Plan:
    """How to compute the loss of `p` on `device`. Pure arithmetic: nothing is measured, nothing waits.

    Args:
        device: its ceilings, or None if they are not known: then bytes decide.
        budget: bytes beyond inputs and returned gradients, all of which may be used. None: chunks of the rule, or
            another method if it is faster and no larger. The rule is C = max(1024, 2 D), bounded by `chunk_bytes`.
        chunk_bytes: of one V-wide float32 buffer; None: the device's default. On a CPU, where the buffer should stay
            in the caches, this measured rule alone decides, as long as it fits.
        methods: of METHODS, those that may be chosen.
    """
    return choose(candidates(p, device, budget, chunk_bytes, methods))
