"""What importing the package costs beside importing torch: python -m benchmarks import_time [--rounds N] [--json FILE]

Each variant is a fresh process, started and waited for, with the bytecode of all modules compiled; the variants take
turns. `of_torch` is the median over the rounds of a variant's time over that of `import torch` in the same round, as is
`of_torch_cpu` of the processes' CPU times. `modules` counts what a variant loads beyond torch's own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import runner

ROOT = Path(__file__).parents[1]
VARIANTS = {
    "torch": ["-c", "import torch"],
    "effkern": ["-c", "import effkern"],
    "effkern.nn": ["-c", "import effkern.nn"],
    "effkern.optim": ["-c", "from effkern.optim import LoRARite, Shampoo"],
    "effkern.models": ["-c", "import effkern.models"],
    "effkern.train": ["-c", "from effkern.train import TrainConfig"],
    "effkern --help": ["-m", "effkern", "--help"],
    "python": ["-c", "pass"],
}
"""Arguments of the interpreter."""


def environment() -> dict[str, str]:
    """That of a user: the package on the path, bytecode written and read."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])}


def seconds(arguments: Sequence[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one fresh process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], env=environment(), stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)!r} must exit with 0, got {process.returncode}")
    return wall, used.ru_utime + used.ru_stime


def loaded(arguments: Sequence[str]) -> int:
    """Modules of one variant, or 0 for a command."""
    if arguments[0] != "-c":
        return 0
    code = f"{arguments[1]}; import sys; print(len(sys.modules))"
    return int(subprocess.run([sys.executable, "-c", code], env=environment(), stdout=-1, check=True).stdout)


def measure(rounds: int, warmup: int = 1) -> tuple[dict[str, runner.Timing], dict[str, dict]]:
    """Times of each variant, and what else its line says."""
    found: runner.Rounds = {name: [] for name in VARIANTS}
    for i in range(warmup + rounds):
        for name, arguments in VARIANTS.items():
            pair = seconds(arguments)
            if i >= warmup:
                found[name].append(pair)
    torch = found["torch"]
    base = loaded(VARIANTS["torch"])
    extra: dict[str, dict] = {}
    for name, pairs in found.items():
        extra[name] = {
            "of_torch": statistics.median(own[0] / other[0] for own, other in zip(pairs, torch)),
            "of_torch_cpu": statistics.median(own[1] / other[1] for own, other in zip(pairs, torch)),
        }
        if "effkern" in name and (count := loaded(VARIANTS[name])):
            extra[name]["modules"] = count - base
    return {name: runner.summary(pairs) for name, pairs in found.items()}, extra


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks import_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=11, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="result lines in FILE")
    a = parser.parse_args(arguments)
    if a.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {a.rounds}")
    timings, extra = measure(a.rounds)
    print(json.dumps(runner.machine()))
    print(f"{'variant':<16}{'wall ms':>9}{'low':>8}{'high':>8}{'cpu ms':>8}{'of torch':>10}{'cpu':>7}{'modules':>9}")
    for name, t in timings.items():
        more = extra[name]
        times = f"{1e3 * t.wall:>9.0f}{1e3 * t.wall_low:>8.0f}{1e3 * t.wall_high:>8.0f}{1e3 * t.cpu:>8.0f}"
        print(f"{name:<16}{times}{more['of_torch']:>10.3f}{more['of_torch_cpu']:>7.3f}{more.get('modules', ''):>9}")
    if a.json:
        lines = runner.result_lines("import_time", {"device": "cpu"}, timings, extra)
        temporary = a.json.with_name(a.json.name + ".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines))
        os.replace(temporary, a.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
