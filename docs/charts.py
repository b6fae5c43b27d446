"""What the site draws for each op, and where the committed results hold it; the drawing is in figures.py.

A chart takes the first of its sources that was measured, so that a page keeps its figure while results are renewed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import lines
from benchmarks.report_plots import brief

MS = 1e3
# How names of this package's variants begin.
OWN = ("effkern", "ours", "LoRA-RITE")
# Copies and parts of floors are no variants of the op.
NEVER = ("copy", "floor: Gram", "floor: eigh", "floor: products", "floor: embedding", "floor: gram")


@dataclass(frozen=True)
class Bars:
    """A value per variant of one case."""

    title: str
    unit: str
    command: str
    values: Mapping[str, float]
    own: tuple[str, ...]
    """Variants that are this package's."""
    case: str
    machine: Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A value against a size."""

    title: str
    unit: str
    size: str
    command: str
    points: tuple[tuple[float, float], ...]
    case: str
    machine: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Lines of a benchmark, a value per variant, of the case that fits `where` and has most variants on one machine."""

    benchmark: str
    quantity: str = "wall"
    title: str = "Time"
    unit: str = "ms"
    scale: float = MS
    where: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    only: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()

    def find(self) -> Bars | None:
        cases: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
        for line in committed():
            case, variant = line["case"], line["variant"]
            fits = line["benchmark"] == self.benchmark and variant not in (*NEVER, *self.leave)
            fits = fits and (not self.only or variant in self.only)
            if fits and line.get(self.quantity) and all(case.get(key) == value for key, value in self.where.items()):
                place = json.dumps(case), str(line.get("processor")), str(line.get("gpu"))
                cases.setdefault(place, {})[variant] = line
        if not cases:
            return None
        (case, *_), found = max(cases.items(), key=lambda item: len(item[1]))
        if len(found) < 2:
            return None
        values = {self.names.get(name, name): self.scale * line[self.quantity] for name, line in found.items()}
        said = brief({k: v for k, v in json.loads(case).items() if k not in ("of", "op", "file")})
        machine = next(iter(found.values()))
        own = tuple(name for name in values if name.startswith(OWN))
        command = self.command or f"benchmarks {self.benchmark}"
        return Bars(self.title, self.unit, command, values, own, said, machine)


@dataclass(frozen=True)
class Table:
    """Rows of a JSON file of results, one value per row; all of them are this package's.

    case: with names of the file's fields in braces.
    """

    file: str
    rows: str
    name: str
    quantity: str
    title: str
    unit: str
    command: str
    case: str
    where: Mapping[str, Any] = field(default_factory=dict)

    def find(self) -> Bars | None:
        path = lines.RESULTS / self.file
        if not path.exists():
            return None
        whole = json.loads(path.read_text())
        rows = [r for r in whole[self.rows] if all(r.get(key) == value for key, value in self.where.items())]
        values = {r[self.name]: r[self.quantity] for r in rows if r.get(self.quantity)}
        machine = {**whole, "processor": whole.get("cpu", whole.get("processor"))}
        if len(values) < 2:
            return None
        case = self.case.format(**{**whole, **self.where})
        return Bars(self.title, self.unit, self.command, values, tuple(values), case, machine)


@dataclass(frozen=True)
class Growth:
    """CPU time of the op against one of its sizes, of `python -m benchmarks scaling`."""

    op: str
    against: str
    name: str = ""

    def find(self) -> Curve | None:
        found = [
            line for line in committed()
            if line["benchmark"] == "scaling"
            and line["case"]["op"] == self.op
            and line["case"]["against"] == self.against
        ]  # fmt: skip
        if len(found) < 2:
            return None
        points = sorted((line["case"][self.against], MS * line["cpu"]) for line in found)
        case = {k: v for k, v in found[0]["case"].items() if k not in ("op", "against", self.against)}
        size = self.name or self.against
        return Curve(f"CPU time against {size}", "ms", size, "benchmarks scaling", tuple(points), brief(case), found[0])


@dataclass(frozen=True)
class Formula:
    """Bars that a formula gives: nothing was measured, and the figure says so."""

    title: str
    unit: str
    case: str
    values: Mapping[str, float]

    def find(self) -> Bars:
        own = tuple(name for name in self.values if name.startswith(OWN))
        return Bars(self.title, self.unit, "", self.values, own, self.case, {})


def memory(benchmark: str, **where: Any) -> Source:
    return Source(benchmark, "peak_mib", "Rise of memory at the peak of a call", "MiB", 1.0, where)


FLOAT32 = {"dtype": "float32"}
CATALOGUE = {"of": "distill_catalogue", "divergence": "forward_kl", "dtype": "float32", "case": "logits"}
PRODUCTS = {"products": "the three bare products"}
PRODUCT = {"products": "the bare products"}
UPDATE = ("effkern update", "index_add")
POOLED = {"projected": "effkern, then projected", "folded": "effkern, projection folded", "gather": "rows gathered"}
SOLVERS = {
    "auto": "effkern, auto", "jacobi": "effkern, Jacobi", "lapack": "effkern, LAPACK", "torch": "torch.linalg.eigh",
}  # fmt: skip

# Page of the op: its charts, each a choice of sources in order. Pages that are not here have the ordinary two.
CHARTS: dict[str, tuple[tuple[Source | Table | Growth | Formula, ...], ...]] = {
    "linear_distill_loss": (
        (
            Source("distill", where={"case": "logits", **FLOAT32}, names=PRODUCTS),
            Source("distill", where=FLOAT32, names=PRODUCTS),
            Source(
                "records", unit="times the bare products", scale=1.0, where=CATALOGUE, names=PRODUCTS,
                command="benchmarks distill_catalogue",
            ),
        ),
        (
            memory("distill", case="logits", **FLOAT32),
            memory("distill", **FLOAT32),
            Source(
                "records", "peak_mib", "Rise of memory at the peak of a call", "MiB", 1.0,
                {**CATALOGUE, "of": "distill_memory"},
                command="benchmarks distill_catalogue --memory",
            ),
        ),
        (Growth("distill", "rows", "tokens"),),
        (Growth("distill", "vocab", "vocabulary"),),
    ),
    "vocab_parallel_distill_loss": (
        (
            Formula(
                "Sent per token, forward KL at a temperature", "bytes",
                "vocabulary 128000, hidden size 4096, bfloat16; an all-gather of the logits beside the op's sums",
                {
                    "logits gathered": 2.0 * 128_000,
                    # Maxima, sums and statistics in float32; the gradient in the type of hidden.
                    "effkern, with the gradient of hidden": 4.0 * (2 + 3 + 13) + 2 * 4096,
                    "effkern, statistics alone": 4.0 * (2 + 3 + 13),
                },
            ),
        ),
    ),
    "soft_labels": (
        (Source("soft_labels", where={"method": "topk", **FLOAT32}), Source("soft_labels", where=FLOAT32)),
        (memory("soft_labels"),),
        (
            Table(
                "soft_labels-v32000.json", "records", "labels", "bytes_per_token", "Stored per token", "bytes",
                "benchmarks.soft_labels", "a teacher of this package, vocabulary {vocab}, real text",
            ),
        ),
        (Growth("soft_labels", "vocab", "vocabulary"),),
    ),
    "token_stats": (
        (Source("token_stats", where=FLOAT32), Source("token_stats")),
        (memory("token_stats", **FLOAT32), memory("token_stats")),
        (Growth("token_stats", "rows", "tokens"),),
        (Growth("token_stats", "vocab", "vocabulary"),),
    ),
    "laurel_residual": (
        (
            Source("laurel", where={"rows": 8192, "dim": 2048, "rank": 32, "pass": "both", **FLOAT32}),
            Source("laurel", where={"pass": "both", **FLOAT32}),
        ),
        (
            memory("laurel", rows=8192, dim=2048, **{"pass": "both", **FLOAT32}),
            Source(
                "records", "peak_mib", "Rise of memory at the peak of a call", "MiB", 1.0,
                {"of": "laurel_memory", **FLOAT32}, command="benchmarks laurel --memory",
            ),
        ),
        (Growth("laurel", "rows", "tokens"),),
        (Growth("laurel", "rank", "rank"),),
    ),
    "loop_step": (
        (
            Source("loop_step", where={"form": "glue", "rows": 8192, "dim": 768, "pass": "both", **FLOAT32}),
            Source("loop_step", where={"pass": "both", **FLOAT32}),
        ),
        (
            memory("loop_step", **{"form": "glue", "rows": 8192, "pass": "both", **FLOAT32}),
            memory("loop_step", **{"pass": "both", **FLOAT32}),
        ),
        (Growth("loop_step", "rows", "tokens"),),
    ),
    "loop_similarity": (
        (Source("loop_similarity", where={"pass": "both", **FLOAT32}),),
        (memory("loop_similarity", **{"pass": "both", **FLOAT32}),),
        (Growth("loop_similarity", "dim", "width"),),
    ),
    "looped_linear_attention": (
        (Source("looped_linear_attention", where={"pass": "both"}),),
        (memory("looped_linear_attention"),),
        (Growth("looped_linear_attention", "batch", "problems"),),
        (Growth("looped_linear_attention", "loops", "loops"),),
    ),
    "mean_pool": (
        (Source("mean_pool", title="Token embeddings", where={"kind": "tokens", **FLOAT32}, names=POOLED),),
        (Source("mean_pool", title="Hidden states, normalised", where={"kind": "hidden", **FLOAT32}),),
        (memory("mean_pool"),),
    ),
    "kmeans": (
        (Source("kmeans", title="The nearest centroid", where={"m": 1, **FLOAT32}, names=PRODUCT, leave=UPDATE),),
        (Source("kmeans", title="The 16 nearest", where={"m": 16, **FLOAT32}, names=PRODUCT, leave=UPDATE),),
        (Source("kmeans", title="New means", where={"m": 1, **FLOAT32}, only=UPDATE),),
        (memory("kmeans"),),
    ),
    "matrix_inverse_root": (
        (Source("shampoo_step", title="One step of all parameters"),),
        (Source("shampoo_step", "state_mib", "State", "MiB", 1.0),),
        (Growth("shampoo", "width", "width"),),
        (Growth("shampoo", "layers", "layers"),),
    ),
    "batched_eigh": (
        (Source("batched_eigh", title="Order 64", where={"n": 64, **FLOAT32}, names=SOLVERS),),
        (Source("batched_eigh", title="Order 16", where={"n": 16, **FLOAT32}, names=SOLVERS),),
        (
            Source(
                "batched_eigh", "peak_mib", "Rise of memory at the peak of a call", "MiB", 1.0, FLOAT32, SOLVERS,
            ),
        ),
        (Growth("batched_eigh", "n", "order n"),),
        (Growth("batched_eigh", "count", "matrices"),),
    ),
    "lora_rite": (
        (Source("lora_rite", where={"rank": 16}, title="One step of all pairs"),),
        (
            Source("peers", "state_mib", "State", "MiB", 1.0, {"op": "lora_optimizers"}, command="benchmarks.peers"),
            memory("lora_rite"),
        ),
        (Growth("lora_rite", "rows", "rows of a factor"),),
        (Growth("lora_rite", "rank", "rank"),),
    ),
    "looped_block": (
        (
            Table(
                "looped_modes_time.json", "records", "variant", "wall", "Forward and backward", "s",
                "benchmarks.looped_modes --parts time", "{layers} layers, {loops} loops, [{batch}, {length}, {dim}]",
                {"part": "time", "layers": 2, "loops": 8},
            ),
        ),
        (
            Table(
                "looped_modes_memory.json", "records", "mode", "states", "Peak memory", "states",
                "benchmarks.looped_modes --parts memory",
                "{layers} layers, {loops} loops; a state is [{batch}, {length}, {dim}]",
                {"part": "memory", "layers": 2, "loops": 12},
            ),
        ),
    ),
}  # fmt: skip


@cache
def committed() -> tuple[lines.Record, ...]:
    return tuple(lines.committed())


def charts(op: str) -> list[Bars | Curve]:
    """Of an op, as far as its figures are among the committed ones."""
    pages = sorted(path.stem for path in (Path(__file__).parent / "ops").glob("*.md"))
    if op not in pages:
        raise ValueError(f"op must be one of {', '.join(pages)}, got {op!r}")
    ordinary = ((Source(op, where={"pass": "both"}),), (memory(op, **{"pass": "both"}),))
    return [chart for choice in CHARTS.get(op, ordinary) if (chart := first(choice)) is not None]


def first(choice: tuple[Source | Table | Growth | Formula, ...]) -> Bars | Curve | None:
    """Of the sources in order, what the first that was measured holds."""
    found = (source.find() for source in choice)
    return next((chart for chart in found if chart is not None), None)
