"""Everything a machine with a GPU must show: python -m benchmarks.gpu_session [--parts PART ...]

Builds the compiled modules in place, runs the op tests on the device, then the benchmarks, and writes
benchmarks/results/<date>-<device>-<parts>.jsonl (one measurement per line) and .md (what ran, what failed, the tables).
A step that fails or overruns is recorded and the next one starts; exit status 1 if any did. Each part ends within
9 minutes, for machines that are lent for ten at a time; "build" comes first.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable

# Case, divergence, rows, hidden size of the student and of the teacher, vocabulary.
LOSSES = [
    ("hidden", "forward_kl", 8192, 4096, 4096, 128256),
    ("hidden", "forward_kl", 8192, 2048, 2048, 128256),
    ("hidden", "jsd", 8192, 4096, 4096, 128256),
    ("logits", "forward_kl", 8192, 4096, 4096, 128256),
    ("hard", "forward_kl", 8192, 4096, 4096, 128256),
    ("hidden", "forward_kl", 8192, 1024, 512, 32000),
    ("hidden", "jsd", 8192, 1024, 512, 32000),
]
LAUREL_TESTS = "tests/ops/test_laurel_triton.py"
OPTIM_TESTS = [
    "tests/ops/test_batched_eigh.py",
    "tests/ops/test_lora_rite.py",
    "tests/ops/test_lora_rite_invariance.py",
    "tests/ops/test_lora_rite_triton.py",
    "tests/ops/test_shampoo.py",
    "tests/ops/test_shampoo_root.py",
    "tests/ops/test_shampoo_triton.py",
]
LOOPED_TESTS = ["tests/ops/test_loop_step_triton.py", "tests/ops/test_looped_linear_attention_triton.py"]
# The first compares all variants with float64; the last is decoding.
LAUREL = [
    "--variant=rw_lr --check-all",
    "--variant=gemma",
    "--variant=rw_lr_pa --dim=768 --rank=32",
    "--variant=rw_lr --rows=32",
]


@dataclass
class Step:
    """One command: `seconds` is its limit, `lines` says whether it prints measurements as JSON lines."""

    name: str
    command: list[str]
    seconds: int
    lines: bool = False


PARTS = ("build", "ops", "laurel", "looped", "optim", "speed")


def steps(part: str, build_dir: str) -> list[Step]:
    """What `part` runs; its limits add up to less than 9 minutes."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    if part == "build":
        return build_steps(build_dir)
    if part == "ops":
        apart = [f"--ignore={path}" for path in (LAUREL_TESTS, *LOOPED_TESTS, *OPTIM_TESTS)]
        return [Step("tests of the ops on the device", [*pytest, "tests/ops", *apart], 500)]
    # Apart, as most of the time is the compiler's: every option is another kernel.
    if part == "laurel":
        return [Step("laurel tests on the device", [*pytest, LAUREL_TESTS], 500)]
    if part == "looped":
        return [Step("tests of the looped ops on the device", [*pytest, *LOOPED_TESTS], 500)]
    if part == "optim":
        return optim_steps(pytest)
    return speed_steps()


def build_steps(build_dir: str) -> list[Step]:
    return [
        Step("configure", ["cmake", "-S", ".", "-B", build_dir, "-G", "Ninja", f"-DPython_EXECUTABLE={PYTHON}",
                           f"-DEFFKERN_OUTPUT_DIR={ROOT / 'effkern'}"], 60),
        Step("build", ["cmake", "--build", build_dir], 400),
        Step("doctor", [PYTHON, "-m", "effkern.cli_doctor"], 30),
    ]  # fmt: skip


def optim_steps(pytest: list[str]) -> list[Step]:
    found = [Step("tests of the optimizers' ops on the device", [*pytest, *OPTIM_TESTS, "tests/optim"], 380)]
    for options in ("--ranks=16 --pairs=500 --rows=4096", "--ranks=64 --pairs=64 --rows=4096"):
        command = [PYTHON, "-m", "benchmarks.ops.lora_rite", "--device=cuda", "--rounds=9", "--json", *options.split()]
        found.append(Step(f"lora_rite {options}", command, 45, lines=True))
    command = [PYTHON, "-m", "benchmarks.ops.batched_eigh", "--device=cuda", "--rounds=5", "--json"]
    roots = [PYTHON, "-m", "benchmarks.ops.shampoo_gpu", "--json"]
    return [*found, Step("batched_eigh", command, 30, lines=True), Step("shampoo roots", roots, 30, lines=True)]


def speed_steps() -> list[Step]:
    found = []
    for case, divergence, rows, dim, teacher_dim, vocab in LOSSES:
        options = f"--case={case} --divergence={divergence} --rows={rows} --dim={dim} --teacher-dim={teacher_dim}"
        command = [PYTHON, "-m", "benchmarks.ops.distill", *options.split(), f"--vocab={vocab}", "--dtype=bfloat16"]
        name = f"distill {case} {divergence} {rows} x {dim} x {vocab}"
        found.append(Step(name, [*command, "--rounds=5", "--json"], 45, lines=True))
    command = [PYTHON, "-m", "benchmarks.ops.token_stats", "--dtype=bfloat16", "--dim=256", "--json"]
    found.append(Step("token_stats", command, 30, lines=True))
    for options in LAUREL:
        command = [PYTHON, "-m", "benchmarks.ops.laurel_gpu", "--rounds=5", "--json", *options.split()]
        found.append(Step(f"laurel {options}", command, 35, lines=True))
    options = "--forms=glue --dims=2048 --rows=8192 --dtypes=bfloat16 --rounds=5 --json"
    found.append(Step("loop_step", [PYTHON, "-m", "benchmarks.ops.loop_step", *options.split()], 20, lines=True))
    options = "--dims=2048 --layers=12 --block=4 --dtypes=bfloat16 --json"
    command = [PYTHON, "-m", "benchmarks.ops.loop_similarity", *options.split()]
    found.append(Step("loop_similarity", command, 20, lines=True))
    found.append(Step("label_rank", [PYTHON, "-m", "benchmarks.ops.label_rank", "--json"], 15, lines=True))
    return found


def run(step: Step) -> tuple[bool, str, float]:
    """Whether the step succeeded, what it printed, and how long it took."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            step.command, cwd=ROOT, env=environment, timeout=step.seconds, check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        return False, out + f"\nstopped after {step.seconds} s", time.monotonic() - start
    return done.returncode == 0, done.stdout, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--build-dir", default="build/gpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    a = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_session: this machine must have a CUDA device; torch sees none", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    names = [date.today().isoformat(), re.sub("[^A-Za-z0-9]+", "-", device)]
    if len(a.parts) < len(PARTS):
        names += a.parts
    stem = "-".join(names)
    measurements: list[str] = []
    report = [
        f"# {device}, {date.today().isoformat()}",
        "",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}",
        "",
    ]
    failed = []
    for step in (step for part in a.parts for step in steps(part, a.build_dir)):
        ok, out, seconds = run(step)
        print(f"{'ok    ' if ok else 'FAILED'} {seconds:6.1f} s  {step.name}", flush=True)
        if not ok:
            failed.append(step.name)
            print(out[-4000:], flush=True)
        if step.lines:
            measurements += [line for line in out.splitlines() if line.startswith("{")]
        tail = "\n".join(out.splitlines()[-25:])
        report += [f"## {step.name}: {'ok' if ok else 'failed'}, {seconds:.0f} s", "", "```", tail, "```", ""]
    a.out.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".jsonl", "\n".join(measurements) + "\n"), (".md", "\n".join(report))):
        temporary = a.out / f"{stem}{suffix}.tmp"
        temporary.write_text(text)
        temporary.replace(a.out / f"{stem}{suffix}")
    print(f"{len(measurements)} measurements; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
