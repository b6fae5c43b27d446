"""Everything a machine with a GPU must show: python -m benchmarks.gpu_session [--parts PART ...] [--tune]

Builds the compiled modules in place, runs the tests that are marked gpu and the op tests on the device, then the
benchmarks on the shapes of the targets, and writes benchmarks/results/<date>-<device>-<parts>.json (what ran, what it
took, what failed, all measurements), .jsonl (the measurements alone, for `check` and `report`) and .md (the tables).
Files are written anew after every step, and the output of the step that runs lies in <stem>.running, so that a killed
session leaves what it has. A step that fails or overruns is recorded and the next one starts; exit status 1 if any did,
3 if none did and the budget cut or left out some.

A session ends within 9 minutes, for machines that are lent for ten at a time: steps get what is left of --budget, by
default 530 s, in the order of their importance: the build, the shapes of the targets, then tests, other packages and
further sizes, part after part; what no time is left for is named as left out. --parts chooses parts; each ends within 9
minutes by the limits of its own steps, and there is no budget unless one is given. --wheels: a folder of pure wheels of
other packages (liger-kernel ...), unpacked and put on the path. --tune adds a part that times other launch parameters
and writes proposals; nothing is edited.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.lines import Record, measured

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
    """One command: `seconds` is its limit, `lines` says whether it prints measurements as JSON lines, `target` whether
    targets need them."""

    name: str
    command: list[str]
    seconds: int
    lines: bool = False
    target: bool = False


# In the order of their importance.
PARTS = ("build", "marked", "speed", "peers", "optim", "ops", "laurel", "looped")
TUNE = "tune"
# Of a session without --parts: under 9 minutes, and what starting and writing take.
BUDGET = 530.0
# Exit status where nothing failed and not everything ran.
INCOMPLETE = 3


def steps(part: str, build_dir: str, proposals: str = "launches.json") -> list[Step]:
    """What `part` runs; its limits add up to at most 9 minutes."""
    plain = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m"]
    pytest = [*plain, "not slow"]
    if part == "build":
        return build_steps(build_dir)
    if part == "marked":
        return [Step("every test marked gpu", [*plain, "gpu", "tests"], 500)]
    if part == "peers":
        return peer_steps()
    if part == TUNE:
        return [Step("tune", [PYTHON, "-m", "benchmarks.tune", "--seconds=480", f"--json={proposals}"], 520)]
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


def all_steps(build_dir: str) -> list[Step]:
    """What a session runs without --parts: the build, what targets need, and the rest, part after part."""
    build, *others = (steps(part, build_dir) for part in PARTS)
    rest = [step for part in others for step in part]
    return [*build, *sorted(rest, key=lambda step: not step.target)]


def build_steps(build_dir: str) -> list[Step]:
    return [
        Step("configure", ["cmake", "-S", ".", "-B", build_dir, "-G", "Ninja", f"-DPython_EXECUTABLE={PYTHON}",
                           f"-DEFFKERN_OUTPUT_DIR={ROOT / 'effkern'}"], 60),
        Step("build", ["cmake", "--build", build_dir], 400),
        Step("doctor", [PYTHON, "-m", "effkern.cli_doctor"], 30),
    ]  # fmt: skip


def optim_steps(pytest: list[str]) -> list[Step]:
    found = [Step("tests of the optimizers' ops on the device", [*pytest, *OPTIM_TESTS, "tests/optim"], 380)]
    for options, target in (("--ranks=16 --pairs=500 --rows=4096", True), ("--ranks=64 --pairs=64 --rows=4096", False)):
        command = [PYTHON, "-m", "benchmarks.ops.lora_rite", "--device=cuda", "--rounds=9", "--json", *options.split()]
        found.append(Step(f"lora_rite {options}", command, 45, lines=True, target=target))
    command = [PYTHON, "-m", "benchmarks.ops.batched_eigh", "--device=cuda", "--rounds=5", "--json"]
    roots = [PYTHON, "-m", "benchmarks.ops.shampoo_gpu", "--json"]
    found.append(Step("batched_eigh", command, 30, lines=True))
    return [*found, Step("shampoo roots", roots, 30, lines=True, target=True)]


def peer_steps() -> list[Step]:
    """Other packages on the same shapes, as far as they are installed."""
    sizes = "--set rows=8192 dim={0} vocab=128256 dtype=bfloat16"
    loss = sizes + " teacher_dim={0} divergence=forward_kl"
    given = (
        ("distillation", loss.format(4096), 110),
        ("cross_entropy", sizes.format(4096), 80),
        ("distillation", loss.format(2048), 80),
        ("add_norm", "--full --set rows=16384", 50),
        ("lora_optimizers", "--set pairs=500 rows=4096", 70),
        ("matrix_optimizers", "--set width=1024 layers=4", 100),
    )
    command = [PYTHON, "-m", "benchmarks.peers", "--device=cuda", "--rounds=5", "--json"]
    return [
        Step(f"peers {op} {options}", [*command, "--op", op, *options.split()], seconds, True, op == "distillation")
        for op, options, seconds in given
    ]


def speed_steps() -> list[Step]:
    ceilings = [PYTHON, "-m", "benchmarks", "ceilings", "--device=cuda", "--json"]
    found = [Step("ceilings", ceilings, 20, lines=True, target=True)]
    for case, divergence, rows, dim, teacher_dim, vocab in LOSSES:
        options = f"--case={case} --divergence={divergence} --rows={rows} --dim={dim} --teacher-dim={teacher_dim}"
        command = [PYTHON, "-m", "benchmarks.ops.distill", *options.split(), f"--vocab={vocab}", "--dtype=bfloat16"]
        name = f"distill {case} {divergence} {rows} x {dim} x {vocab}"
        target = vocab == 128256 and (case, divergence) in (("hidden", "forward_kl"), ("hard", "forward_kl"))
        found.append(Step(name, [*command, "--rounds=5", "--json"], 42, lines=True, target=target))
    command = [PYTHON, "-m", "benchmarks.ops.token_stats", "--dtype=bfloat16", "--dim=256", "--json"]
    found.append(Step("token_stats", command, 30, lines=True))
    for options in LAUREL:
        command = [PYTHON, "-m", "benchmarks.ops.laurel_gpu", "--rounds=5", "--json", *options.split()]
        found.append(Step(f"laurel {options}", command, 35, lines=True, target="rw_lr --check-all" in options))
    options = "--forms=glue --dims=2048 --rows=8192 --dtypes=bfloat16 --rounds=5 --json"
    found.append(Step("loop_step", [PYTHON, "-m", "benchmarks.ops.loop_step", *options.split()], 20, lines=True))
    options = "--dims=2048 --layers=12 --block=4 --dtypes=bfloat16 --json"
    command = [PYTHON, "-m", "benchmarks.ops.loop_similarity", *options.split()]
    found.append(Step("loop_similarity", command, 20, lines=True))
    found.append(Step("label_rank", [PYTHON, "-m", "benchmarks.ops.label_rank", "--json"], 15, lines=True))
    return found


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    ok: bool
    seconds: float
    out: str
    lines: bool = False
    stopped: bool = False
    left_out: bool = False

    @property
    def state(self) -> str:
        return (
            "ok" if self.ok else "cut" if self.stopped and self.left_out else "left out" if self.left_out else "FAILED"
        )

    @property
    def measurements(self) -> list[Record]:
        """Without the half of a line that a stopped step may leave."""
        return measured(self.out) if self.lines else []


def run(step: Step, seconds: float, running: Path, path: str = "") -> Outcome:
    """The step within `seconds`; its output goes through the file `running`, which outlives a killed session.

    Its processes are one group, which ends with it.
    """
    start = time.monotonic()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), path))),
        "PYTHONUNBUFFERED": "1",
    }
    with running.open("w") as out:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        stopped = ""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = f"\nstopped after {seconds:.0f} s"
        finally:
            # Also where a signal ends the session: no process of a step goes on without it.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = running.read_text(errors="replace") + stopped
    return Outcome(step.name, process.returncode == 0, time.monotonic() - start, text, step.lines, bool(stopped))


def unpack(wheels: Path, target: Path) -> list[str]:
    """Names of the pure wheels of a folder, unpacked into `target`; compiled ones fit one machine and stay."""
    found = []
    for wheel in sorted(wheels.glob("*-none-any.whl")) if wheels.is_dir() else ():
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        found.append(wheel.name)
    return found


def with_copy_share(records: list[Record]) -> list[Record]:
    """Adds `of_copy`, the share of the copy bandwidth, to results that say GB/s and no share, once it is measured."""
    copies = [
        r["bytes"] / r["wall_low"] / 1e9
        for r in records
        if (r["benchmark"], r["variant"]) == ("ceilings", "copy") and r.get("bytes") and r.get("wall_low")
    ]
    if not copies:
        return records

    def shared(r: Record) -> Record:
        applies = "gb_per_s" in r and r["benchmark"] != "ceilings" and r["case"].get("device") == "cuda"
        return {"of_copy": r["gb_per_s"] / max(copies), **r} if applies else r

    return [shared(r) for r in records]


class Session:
    """The files of one session."""

    def __init__(self, folder: Path, device: str, parts: list[str], versions: dict[str, Any]) -> None:
        """`parts`: those that the name says, none where it is all."""
        folder.mkdir(parents=True, exist_ok=True)
        self.stem = folder / "-".join([date.today().isoformat(), re.sub("[^A-Za-z0-9]+", "-", device), *parts])
        self.head: dict[str, Any] = {"device": device, "date": date.today().isoformat(), **versions}
        self.outcomes: list[Outcome] = []

    def file(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.write()

    def write(self) -> None:
        records = with_copy_share([record for o in self.outcomes for record in o.measurements])
        steps = [{k: v for k, v in asdict(o).items() if k not in ("out", "lines")} for o in self.outcomes]
        whole = {**self.head, "steps": steps, "measurements": records}
        report = [f"# {self.head['device']}, {self.head['date']}", ""]
        report += [", ".join(f"{name} {value}" for name, value in self.head.items()), ""]
        for o in self.outcomes:
            tail = "\n".join(o.out.splitlines()[-25:])
            report += [f"## {o.name}: {o.state.lower()}, {o.seconds:.0f} s", "", "```", tail, "```", ""]
        for suffix, text in (
            (".json", json.dumps(whole, indent=1) + "\n"),
            (".jsonl", "".join(f"{json.dumps(record)}\n" for record in records)),
            (".md", "\n".join(report)),
        ):
            temporary = self.file(f"{suffix}.tmp")
            temporary.write_text(text)
            temporary.replace(self.file(suffix))


def stop(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(f"signal {signum}")


def perform(session: Session, chosen: list[Step], budget: float | None, path: str) -> int:
    """Runs the steps; what failed and what no time was left for is named. Exit status."""
    deadline = None if budget is None else time.monotonic() + budget
    failed: list[str] = []
    left_out: list[str] = []
    running = session.file(".running")
    try:
        for step in chosen:
            left = step.seconds if deadline is None else min(step.seconds, deadline - time.monotonic())
            if left < 1:
                session.add(Outcome(step.name, False, 0.0, "no time was left", left_out=True))
                left_out.append(step.name)
                continue
            last = run(step, left, running, path)
            # Ended by the budget and not by its own limit: what it shows is a part, and no failure.
            last.left_out = last.stopped and left < step.seconds
            session.add(last)
            print(f"{last.state:<8} {last.seconds:6.1f} s  {step.name}", flush=True)
            if not last.ok:
                (left_out if last.left_out else failed).append(step.name)
                print(last.out[-4000:], flush=True)
    except KeyboardInterrupt:
        text = running.read_text(errors="replace") if running.exists() else ""
        session.add(Outcome(f"{step.name} (interrupted)", False, 0.0, text, step.lines))
        failed.append(step.name)
    running.unlink(missing_ok=True)
    count = sum(len(o.measurements) for o in session.outcomes)
    print(f"{count} measurements in {session.file('.json')}; failed: {', '.join(failed) or 'none'}")
    if left_out:
        print(f"no time was left for: {', '.join(left_out)}")
    return 1 if failed else INCOMPLETE if left_out else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--build-dir", default="build/gpu")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, TUNE), help="default: all, as far as the budget goes")
    of = f"of the whole session; default: {BUDGET:g}, with --parts none"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=of)
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", metavar="FOLDER")
    parser.add_argument("--tune", action="store_true", help="also propose launch parameters")
    a = parser.parse_args(arguments)
    if a.budget is not None and a.budget <= 0:
        parser.error(f"--budget must be positive, got {a.budget:g}")
    # What is tested of a session needs no torch.
    import torch

    if not torch.cuda.is_available():
        print("gpu_session: this machine must have a CUDA device; torch sees none", file=sys.stderr)
        return 2
    budget = BUDGET if a.budget is None and a.parts is None else a.budget
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    session = Session(a.out, torch.cuda.get_device_name(), a.parts or [], versions)
    unpacked = ROOT / "build" / "peers"
    wheels = unpack(a.wheels, unpacked)
    print(f"wheels: {', '.join(wheels) or 'none'}", flush=True)
    signal.signal(signal.SIGTERM, stop)
    proposals = str(session.file("-launches.json"))
    extra = [TUNE] if a.tune and TUNE not in (a.parts or []) else []
    chosen = [] if a.parts else all_steps(a.build_dir)
    chosen += [step for part in [*(a.parts or []), *extra] for step in steps(part, a.build_dir, proposals)]
    return perform(session, chosen, budget, str(unpacked) if wheels else "")


if __name__ == "__main__":
    sys.exit(main())
