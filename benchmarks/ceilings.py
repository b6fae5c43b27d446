"""What this machine can do at best: python -m benchmarks ceilings [--threads N ...] [--sweep]

Copy: Tensor.copy_ over pairs of buffers in turn, all of them far beyond the cache; bytes read and written per second.
Products: torch.mm of square matrices, FLOPs per second, for each type. `python -m benchmarks run` measures them first,
for each number of threads, and writes into every line that it collects the bound of its case by the roofline,

    bound_s = max(bytes / copy bandwidth, flops / product rate),   of_bound = bound_s / wall,

where of_bound = 1 is the limit; above 1 a case's data are in the cache. --sweep copies sets of buffers in turn and
shows where the cache ends, which is what runner.ROTATE_BYTES was chosen by.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch

from benchmarks.case import Work

NAME = "ceilings"
DTYPES = ("float32", "bfloat16", "float64")
# Of one copy, and of all buffers together. Short pieces, of which the fastest counts, as other work interrupts.
PIECE_MIB = {"cpu": 16, "cuda": 512}
COPY_MIB = {"cpu": 512, "cuda": 4096}
ORDER = {"cpu": 1024, "cuda": 8192}
SWEEP_MIB = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Bound(NamedTuple):
    seconds: float
    memory: float
    products: float

    @property
    def by(self) -> str:
        return "memory" if self.memory >= self.products else "products"


def place(device: str, threads: int) -> tuple[str, int]:
    """A GPU's rates do not depend on the threads of the process."""
    return device, threads if device == "cpu" else 0


class Ceilings:
    """The rates in result lines of `measure`, by device, threads and type."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.bandwidth: dict[tuple[str, int], float] = {}
        self.products: dict[tuple[str, int, str], float] = {}
        for r in records:
            if r["benchmark"] != NAME:
                continue
            where = place(r["case"]["device"], r["threads"])
            if r["variant"] == "copy":
                self.bandwidth[where] = r["bytes"] / r["wall_low"]
            else:
                self.products[(*where, r["case"]["dtype"])] = r["flops"] / r["wall_low"]

    def bound(self, work: Work, device: str, threads: int) -> Bound | None:
        """None where a ceiling that the work needs was not measured."""
        where = place(device, threads)
        bandwidth = self.bandwidth.get(where)
        rate = self.products.get((*where, work.dtype)) if work.flops else 1.0
        if bandwidth is None or rate is None:
            return None
        memory, products = work.bytes / bandwidth, work.flops / rate
        return Bound(max(memory, products), memory, products)

    def with_bound(self, record: dict[str, Any]) -> dict[str, Any]:
        """A result line with bound_s, of_bound and bound_by, if it says what work it did."""
        if "bytes" not in record or record["benchmark"] == NAME:
            return record
        work = Work(record["bytes"], record["flops"], record["flop_dtype"])
        bound = self.bound(work, record["case"].get("device", "cpu"), record["threads"])
        if bound is None:
            return record
        return {**record, "bound_s": bound.seconds, "of_bound": bound.seconds / record["wall"], "bound_by": bound.by}

    def text(self, device: str, threads: int) -> list[str]:
        where = place(device, threads)
        found = [f"copy {self.bandwidth[where] / 1e9:.1f} GB/s"]
        found += [f"{k[2]} {rate / 1e9:.0f} GFLOP/s" for k, rate in self.products.items() if k[:2] == where]
        return [f"ceilings of {device}, {threads} threads: {', '.join(found)}"]


def copy(device: torch.device, piece_mib: int, total_mib: int) -> tuple[Callable[[], object], int]:
    """One copy of `piece_mib`, each time between another pair of buffers; and the bytes that it moves."""
    pairs = []
    for _ in range(max(1, total_mib // (2 * piece_mib))):
        source = torch.ones(piece_mib << 18, device=device)
        pairs.append((torch.zeros_like(source), source))
    return runner.rotating([lambda t=t, s=s: t.copy_(s) for t, s in pairs]), 2 * (piece_mib << 20)  # type: ignore[misc]


def mm(device: torch.device, dtype: str, order: int) -> tuple[Callable[[], object], int]:
    x = torch.randn(order, order, device=device).to(getattr(torch, dtype))
    out = torch.empty_like(x)
    return lambda: torch.mm(x, x, out=out), 2 * order**3


def measure(
    device: torch.device, threads: Sequence[int], dtypes: Sequence[str] = DTYPES, rounds: int = 15
) -> list[dict[str, Any]]:
    """Result lines. The fastest round counts: a ceiling is what the machine can do."""
    order, piece, mib = ORDER[device.type], PIECE_MIB[device.type], COPY_MIB[device.type]
    before, found = torch.get_num_threads(), []
    try:
        for count in threads:
            torch.set_num_threads(count)
            runs = {"copy": copy(device, piece, mib)} | {dtype: mm(device, dtype, order) for dtype in dtypes}
            timings = runner.interleave({name: run for name, (run, _) in runs.items()}, rounds, 2)
            for name, (_, amount) in runs.items():
                case: dict[str, Any] = {"device": device.type, "threads": count}
                case |= {"mib": mib} if name == "copy" else {"dtype": name, "n": order}
                work = Work(amount) if name == "copy" else Work(0.0, amount, name)
                variant = "copy" if name == "copy" else "mm"
                t = timings[name]
                found.append(
                    {"benchmark": NAME, "case": case, "variant": variant, **asdict(t), **work.rates(t.wall),
                     **runner.machine()}
                )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return found


def thread_counts() -> list[int]:
    """1 and 2, which benchmarks ask for, and all cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({count for count in (1, 2, cores) if count <= cores})


def sweep(device: torch.device) -> None:
    """GB/s of copies over pairs of buffers of one MiB in turn, by the size of all of them."""
    runner.keep_memory()
    print("| MiB in turn | GB/s |", "|---|---|", sep="\n")
    for mib in SWEEP_MIB:
        run, moved = copy(device, 1, mib)
        many, count = runner.repeated(lambda run=run, mib=mib: [run() for _ in range(mib // 2)])  # type: ignore[misc]
        wall = runner.interleave({"copy": many}, 5)["copy"].wall
        print(f"| {mib} | {count * (mib // 2) * moved / wall / 1e9:.1f} |", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ceilings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", help="of a CPU; default: 1, 2 and all")
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES, "float16"], default=list(DTYPES))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of text")
    a = parser.parse_args(arguments)
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be one that is there, got 'cuda', and torch sees none")
    if a.threads is not None and min(a.threads) < 1:
        parser.error(f"--threads must be at least 1, got {min(a.threads)}")
    device = torch.device(a.device)
    if a.threads is None:
        a.threads = thread_counts() if a.device == "cpu" else [torch.get_num_threads()]
    if a.sweep:
        torch.set_num_threads(a.threads[0])
        sweep(device)
        return 0
    records = measure(device, a.threads, a.dtypes)
    if a.json:
        print("\n".join(map(json.dumps, records)))
        return 0
    found = Ceilings(records)
    for count in a.threads:
        print("\n".join(found.text(a.device, count)))
    return 0
