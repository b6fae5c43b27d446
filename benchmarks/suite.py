"""The ops' benchmarks in one run, their lines in one file: python -m benchmarks run [--op OP ...] [--quick | --full]

First come the ceilings of this machine (copy and products, for each number of threads), as lines of their own. Each
benchmark then runs in a process of its own, checks its results before it times them, and prints one JSON object per
case and variant, to which the case's bound by those ceilings is added. The file is written anew, whole, after each of
them: a line goes only when a new one of the same benchmark, case, device and variant has come, so that a failed or
interrupted run, a short one, or one on another device loses nothing. Unless --json names a file it is
runs/bench/suite.jsonl; `--full --json benchmarks/results/suite.jsonl` renews what is committed.
`python -m benchmarks check FILE` holds it against targets.toml. What cannot run here is left out, with the reason; exit
status 1 if one failed.
"""

import argparse
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import lines

if TYPE_CHECKING:
    from benchmarks.case import Op

DEFAULT = Path("runs/bench/suite.jsonl")
# Exit status of a benchmark that cannot run here (runner.Skip).
LEFT_OUT = 77

# Options of the short run (minutes) and of the full one; the targets' cases are in both where the time allows.
QUICK = {
    "batched_eigh": ["--orders 8 16 32 64 --rounds=3"],
    "distill": ["--rounds=3 --no-memory", "--case=hidden --rounds=3 --no-memory"],
    "gemm_bf16": ["--dims 512 2048 --rows 256 1024"],
    "kmeans": ["--rounds=3"],
    "label_rank": ["--rounds=5"],
    "laurel": ["--rows=512 --ranks=32 --rounds=5"],
    "loop_similarity": ["--rounds=3 --dtypes=float32 --pass=both"],
    "loop_step": ["--rounds=5 --dims=768 --rows 512 8192 --dtypes=float32"],
    "looped_linear_attention": ["--threads=1 --rounds=3"],
    "lora_rite": ["--rounds=9"],
    "mean_pool": ["--rounds=5"],
    "shampoo": ["--rounds=9"],
    "shampoo_step": ["--rounds=3"],
    "soft_labels": ["--rounds=3 --methods=topk"],
    "token_stats": ["--rounds=3 --no-memory"],
}
# With the peak memory of one case per op.
FULL = {
    "batched_eigh": ["", "--orders=64 --memory --rounds=3"],
    "distill": ["", "--case=hidden", "--case=hard"],
    "gemm_bf16": [""],
    "kmeans": [""],
    "label_rank": ["", "--memory --dtype=bfloat16"],
    "laurel": ["", "--rows=8192 --dims=2048 --ranks=32 --memory --rounds=3"],
    "loop_similarity": ["", "--dims=768 --memory --rounds=3"],
    "loop_step": ["", "--rows=8192 --dims=768 --memory --rounds=3"],
    "looped_linear_attention": ["--threads=1", "--threads=1 --paper --free"],
    "lora_rite": ["", "--memory --rounds=3"],
    "mean_pool": [""],
    "shampoo": [""],
    "shampoo_step": [""],
    "soft_labels": ["", "--dtype=bfloat16 --memory"],
    "token_stats": ["", "--dtype=bfloat16"],
}
# One small case per op, for baselines and pytest: what a call does besides its arithmetic shows here, too.
SMALL = {
    "batched_eigh": "--orders=16 --count=256 --dtypes=float32",
    "distill": "--rows=256 --dim=256 --vocab=8000",
    "gemm_bf16": "--rows=256 --dims=256 --vocab=8000",
    "kmeans": "--points=4000 --centroids=256 --m=1",
    "label_rank": "--rows=256 --vocab=16000",
    "laurel": "--rows=512 --dims=768 --ranks=32 --dtypes=float32 --pass=both",
    "loop_similarity": "--dims=256 --dtypes=float32 --pass=both",
    "loop_step": "--forms=glue --rows=512 --dims=768 --dtypes=float32 --pass=both",
    "looped_linear_attention": "--batches=256 --loops=16 --pass=both --threads=1",
    "lora_rite": "--pairs=16 --ranks=16",
    "mean_pool": "--kinds=tokens --dtypes=float32 --vocab=4096 --dim=128 --length=256",
    "shampoo": "--layers=1 --width=192",
    "soft_labels": "--methods=topk --rows=256 --dim=256 --vocab=8000",
    "token_stats": "--rows=256 --dim=256 --vocab=8000",
}


def module(op: str) -> str:
    """A benchmark of one op, or of a whole step."""
    inner = "ops." if (Path(__file__).parent / "ops" / f"{op}.py").exists() else ""
    return f"benchmarks.{inner}{op}"


def load(op: str) -> "Op":
    """What the op's module declares."""
    return import_module(f"benchmarks.ops.{op}").OP


def kept(path: Path) -> list[str]:
    """What the file holds. Half of a line, as a killed command may leave, is dropped with a warning.

    Raises:
        lines.Unusable: it cannot be read.
    """
    found = []
    for number, line in enumerate(lines.text_of(path).splitlines() if path.exists() else (), 1):
        try:
            lines.record_of(line)
        except ValueError as error:
            print(f"benchmarks run: {path}, line {number} is dropped: {error}", file=sys.stderr)
        else:
            found.append(line)
    return found


def write(path: Path, text: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in text))
    os.replace(temporary, path)


def refusal(path: Path) -> str | None:
    """Why `write` would fail."""
    if path.is_dir():
        return "it is a folder"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        return str(error)
    return None


def commands(op: str, full: bool, device: str | None) -> list[str] | str:
    """Options of each process, or why there is none."""
    given = (FULL if full else QUICK)[op]
    if device is None:
        return given
    if op in SMALL and device in load(op).devices:
        return [f"{options} --device={device}".strip() for options in given]
    return given if op not in SMALL and device == "cpu" else f"its benchmark is not for {device}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=sorted(FULL), default=sorted(FULL))
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="minutes; the default")
    size.add_argument("--full", action="store_true", help="all sizes, which takes the better part of an hour")
    parser.add_argument("--json", type=Path, default=DEFAULT, metavar="FILE", help=f"default: {DEFAULT}")
    a = parser.parse_args(arguments)

    # After the arguments, whose help should not wait for torch.
    from benchmarks.ceilings import NAME, Ceilings
    from benchmarks.harness import missing

    reason = missing(a.device) if a.device else None
    if why := refusal(a.json):
        reason = f"--json must be a file that can be written, got {a.json}: {why}"
    if reason:
        print(f"benchmarks run: {reason}", file=sys.stderr)
        return 2
    try:
        text = kept(a.json)
    except lines.Unusable as error:
        print(f"benchmarks run: {error}", file=sys.stderr)
        return 2

    failed = []
    device = ["--device", a.device] if a.device else []
    status, found = run([sys.executable, "-m", "benchmarks", NAME, "--json", *device], f"{NAME} {' '.join(device)}")
    if status == "FAILED":
        failed.append(NAME)
    ceilings = Ceilings(found)
    text = lines.replaced(text, found)
    write(a.json, text)
    for op in a.op:
        given = commands(op, a.full, a.device)
        if isinstance(given, str):
            print(f"left out        {op}: {given}", flush=True)
            continue
        for options in given:
            command = [sys.executable, "-m", module(op), "--json", *options.split()]
            status, found = run(command, f"{op} {options}".rstrip())
            if status == "FAILED":
                failed.append(op)
            text = lines.replaced(text, [ceilings.with_bound(record) for record in found])
            write(a.json, text)
    print(f"{len(text)} lines in {a.json}; failed: {', '.join(dict.fromkeys(failed)) or 'none'}")
    return 1 if failed else 0


def run(command: list[str], name: str) -> tuple[str, list[lines.Record]]:
    """What became of a benchmark ("ok", "left out" or "FAILED"), and its results."""
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found = lines.measured(done.stdout)
    status = "left out" if done.returncode == LEFT_OUT else "ok" if done.returncode == 0 and found else "FAILED"
    print(f"{status:<8} {time.monotonic() - start:6.1f} s  {name}", flush=True)
    if status != "ok":
        print("\n".join(line for line in done.stdout[-2000:].splitlines() if not line.startswith('{"')), flush=True)
    return status, found
