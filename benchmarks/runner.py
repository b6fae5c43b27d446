"""How benchmarks measure: variants in turn, medians, wall and process CPU time, memory in a process of its own."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

# Spinning OpenMP workers would charge one variant for the waiting of another; set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch


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


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Run every variant once per round, in turn, so that a drift of the machine reaches all alike."""
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(warmup + rounds):
        for name, run in variants.items():
            w, c = time.perf_counter(), time.process_time()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                wall[name].append(time.perf_counter() - w)
                cpu[name].append(time.process_time() - c)
    return {
        name: Timing(statistics.median(wall[name]), min(wall[name]), max(wall[name]), statistics.median(cpu[name]))
        for name in variants
    }


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
    """Text table: times, and ratios to the variant named `floor`."""
    base = timings[floor]
    lines = [f"{'variant':<28}{'wall ms':>9}{'low':>8}{'high':>8}{'cpu ms':>9}{'x floor':>9}{'cpu x':>7}  peak MiB"]
    for name, t in timings.items():
        peak = extra.get(name, {}).get("peak_mib")
        lines.append(
            f"{name:<28}{t.wall * 1e3:>9.1f}{t.wall_low * 1e3:>8.1f}{t.wall_high * 1e3:>8.1f}{t.cpu * 1e3:>9.1f}"
            f"{t.wall / base.wall:>9.2f}{t.cpu / base.cpu:>7.2f}  {'' if peak is None else f'{peak:.0f}'}"
        )
    return "\n".join(lines)
