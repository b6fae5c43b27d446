"""How benchmarks measure: variants in turn, medians, wall and process CPU time, memory in a process of its own."""

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

# Spinning OpenMP workers would charge one variant for the waiting of another; set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch


class Skip(SystemExit):
    """This machine cannot run the benchmark, and why: exit status 77, as test harnesses have it, and no failure."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = 77


def told(main: Callable[[], None]) -> None:
    """Runs a command, which says why it is left out if it is."""
    try:
        main()
    except Skip as skip:
        print(f"left out: {skip}", flush=True)
        raise


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant over the rounds."""

    wall: float
    wall_low: float
    wall_high: float
    cpu: float


def machine() -> dict[str, Any]:
    """What a result line must say about where it was measured."""
    import effkern

    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    return {
        "date": date.today().isoformat(),
        # Not "cpu", which is a variant's process CPU time.
        "processor": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "effkern": effkern.__version__,
        "python": platform.python_version(),
    }


Rounds = dict[str, list[tuple[float, float]]]
"""Wall and process CPU seconds of each variant, round after round."""


def rounds_of(variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> Rounds:
    """Run every variant once per round, in turn, so that a drift of the machine reaches all alike."""
    found: Rounds = {name: [] for name in variants}
    for i in range(warmup + rounds):
        for name, run in variants.items():
            w, c = time.perf_counter(), time.process_time()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                found[name].append((time.perf_counter() - w, time.process_time() - c))
    return found


def summary(pairs: Sequence[tuple[float, float]]) -> Timing:
    wall = [w for w, _ in pairs]
    return Timing(statistics.median(wall), min(wall), max(wall), statistics.median(c for _, c in pairs))


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Medians of `rounds_of`."""
    return {name: summary(pairs) for name, pairs in rounds_of(variants, rounds, warmup).items()}


def repeated(run: Callable[[], object], least: float = 0.1) -> tuple[Callable[[], object], int]:
    """A function that lasts at least about `least` seconds, and how many calls it makes.

    A short call alone would be charged for what the variant before left behind: freed memory, cold caches, timers.
    """
    run()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    count = max(1, int(least / (time.perf_counter() - start)))

    def many() -> None:
        for _ in range(count):
            run()

    return many, count


# Where a copy no longer finds anything in the cache. On a Xeon whose last level of 480 MiB is shared with other tenants
# copies run at 57 GB/s within 2 MiB, 25 to 29 within 4 to 64, and at 13 to 14.5 from 128 MiB to 1 GiB alike
# (python -m benchmarks ceilings --sweep): a tenant's share is far below the nominal size.
ROTATE_BYTES = 128 << 20
# Sets of inputs, where one is a few KiB.
MOST_SETS = 64


def rotating(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A function that calls the next of `runs` each time, so that no call finds its inputs in the cache."""
    if len(runs) == 1:
        return runs[0]
    turn = itertools.cycle(runs)
    return lambda: next(turn)()


def keep_memory() -> None:
    """From now on malloc keeps what is freed (glibc; elsewhere nothing happens).

    Left alone it gives results of some MiB back to the system or not, as the variants before happened to leave the
    heap, and a page fault for each 4 KiB (1 to 14 us on a virtual machine) costs more than many a variant's work.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1
        # Not every glibc takes the first; a trim threshold of -1 is none.
        if not mallopt(mmap_threshold, 1 << 30):
            mallopt(mmap_threshold, 1 << 25)
        mallopt(trim_threshold, -1)


def peak_memory(prepare: Callable[[], Callable[[], object]]) -> int:
    """Bytes by which one call of what `prepare` returns raises the resident memory of this process, at its peak.

    To be called in a fresh process (see `in_fresh_process`). The first call of the function is not counted; what it
    leaves behind (gradients) belongs to the base.
    """
    import ctypes

    run = prepare()
    run()
    ctypes.CDLL(None).malloc_trim(0)

    def status(field: str) -> int:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))

    # Sets the high-water mark back to the present.
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status("VmRSS:")
    run()
    return status("VmHWM:") - before


def peak_device_memory(run: Callable[[], object]) -> int:
    """The same on a GPU, from its allocator."""
    run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def in_fresh_process(module: str, *args: str) -> str:
    """Standard output of `python -m module args`, with malloc returning large blocks to the system at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", module, *args], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def result_lines(benchmark: str, case: dict[str, Any], timings: dict[str, Timing], extra: dict[str, dict]) -> list[str]:
    """One JSON object per variant."""
    return [
        json.dumps(
            {"benchmark": benchmark, "case": case, "variant": name, **asdict(t), **extra.get(name, {}), **machine()}
        )
        for name, t in timings.items()
    ]


def table(timings: dict[str, Timing], floor: str, extra: dict[str, dict]) -> str:
    """Text table: times, ratios to the variant named `floor` (or `of_floor` of the extra fields), rates, memory."""
    known = (("gb_per_s", "GB/s", 1.0, 1), ("tflop_per_s", "GFLOP/s", 1e3, 1), ("of_bound", "of bound", 1.0, 2),
             ("state_over_parameters", "state", 1.0, 3), ("peak_mib", "peak MiB", 1.0, 0))  # fmt: skip
    columns = [c for c in known if any(e.get(c[0]) for e in extra.values())]
    lines = [
        f"{'variant':<32}{'wall ms':>10}{'low':>9}{'high':>9}{'cpu ms':>10}{'x floor':>9}{'cpu x':>7}"
        + "".join(f"{title:>10}" for _, title, _, _ in columns)
    ]
    for name, t in timings.items():
        more = extra.get(name, {})
        ratios: list[float | None]
        if floor in timings:
            ratios = [t.wall / timings[floor].wall, t.cpu / timings[floor].cpu]
        else:
            ratios = [more.get("of_floor"), more.get("of_floor_cpu")]
        cells = [f"{1e3 * s:>{w}.{3 if t.wall < 0.01 else 1}f}" for s, w in
                 ((t.wall, 10), (t.wall_low, 9), (t.wall_high, 9), (t.cpu, 10))]  # fmt: skip
        cells += [" " * w if r is None else f"{r:>{w}.2f}" for r, w in zip(ratios, (9, 7))]
        for key, _, factor, digits in columns:
            value = more.get(key)
            cells.append(" " * 10 if value is None else f"{factor * value:>10.{digits}f}")
        lines.append(f"{name:<32}{''.join(cells)}".rstrip())
    return "\n".join(lines)
