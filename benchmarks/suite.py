"""The ops' benchmarks in one run, their lines in one file: python -m benchmarks run [--op OP ...] [--full]

Each benchmark runs in a process of its own, checks its results before it times them, and prints one JSON object per
case and variant. The file is written anew, whole, after each of them, so that an interrupted run leaves what it
measured; what the file held of other ops stays. `python -m benchmarks check FILE` holds it against targets.toml.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.targets import LATEST

# Options of the short run (minutes) and of the full one; the targets' cases are in both where the time allows.
QUICK = {
    "batched_eigh": ["--orders 8 16 32 64 --rounds=3"],
    "distill": ["--rounds=3 --no-memory", "--case=hidden --rounds=3 --no-memory"],
    "gemm_bf16": [""],
    "kmeans": ["--rounds=3"],
    "label_rank": ["--rounds=5"],
    "laurel": ["--rows=512 --ranks=32 --rounds=5"],
    "loop_similarity": ["--rounds=3 --dtypes=float32 --pass=both"],
    "loop_step": ["--rounds=5 --dims=768"],
    "lora_rite": ["--rounds=9"],
    "mean_pool": ["--rounds=5"],
    "shampoo": ["--rounds=9"],
    "shampoo_step": ["--rounds=3"],
    "looped_linear_attention": ["--threads=1 --rounds=3"],
    "token_stats": ["--rounds=3"],
}
FULL = {
    "batched_eigh": [""],
    "distill": ["", "--case=hidden", "--case=hard"],
    "gemm_bf16": [""],
    "kmeans": [""],
    "label_rank": [""],
    "laurel": [""],
    "loop_similarity": [""],
    "loop_step": [""],
    "lora_rite": [""],
    "mean_pool": [""],
    "shampoo": [""],
    "shampoo_step": [""],
    "looped_linear_attention": ["--threads=1", "--threads=1 --paper --free"],
    "token_stats": ["", "--dtype=bfloat16"],
}


def module(op: str) -> str:
    """A benchmark of one op, or of a whole step."""
    inner = "ops." if (Path(__file__).parent / "ops" / f"{op}.py").exists() else ""
    return f"benchmarks.{inner}{op}"


def lines_of(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith('{"') and '"variant"' in line]


def kept(path: Path, ops: list[str]) -> list[str]:
    """Lines of other ops."""
    if not path.exists():
        return []
    return [line for line in lines_of(path.read_text()) if json.loads(line)["benchmark"] not in ops]


def write(path: Path, lines: list[str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines))
    os.replace(temporary, path)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=sorted(FULL), default=sorted(FULL))
    parser.add_argument("--full", action="store_true", help="all sizes, which takes the better part of an hour")
    parser.add_argument("--json", type=Path, default=LATEST, metavar="FILE", help=f"default: {LATEST.name} in results/")
    a = parser.parse_args(arguments)
    lines, failed = kept(a.json, a.op), []
    for op in a.op:
        for options in (FULL if a.full else QUICK)[op]:
            start = time.monotonic()
            command = [sys.executable, "-m", module(op), "--json", *options.split()]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            found = lines_of(done.stdout)
            ok = done.returncode == 0 and found
            print(f"{'ok    ' if ok else 'FAILED'} {time.monotonic() - start:6.1f} s  {op} {options}", flush=True)
            if not ok:
                failed.append(op)
                print(done.stdout[-2000:], flush=True)
            lines += found
            write(a.json, lines)
    print(f"{len(lines)} lines in {a.json}")
    return 1 if failed else 0
