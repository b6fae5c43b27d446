"""Memory and step time of every preset on this machine's CPU, beside what `effkern estimate` says of them.

    python -m benchmarks.preset_estimates [--only demo small ...] [--limit-gib 18] [--json FILE]

A preset's own model, teacher, optimizer and length, in float32 without torch.compile; a micro-batch of its own size
where the estimate then fits both limits, else of one row, and one micro-batch a step. Those that do not fit in memory
with one row are listed with their estimate alone. Each runs in a process of its own, on tokens of the standard
library's text, with untrained weights.

    memory   the process's resident memory at its peak, less what it held after a step of a tiny model (libraries,
             thread pools), where malloc gives back at once what is freed (as all benchmarks measure it), beside the sum
             of the estimate's parts
    process  the same with malloc as it is: what it keeps to use again comes on top. Not measured where a step takes
             longer than LONG_S; the times are then those of the process whose memory was measured
    step     median of the steps after the first, which makes the optimizer's state; beside the estimate with this
             machine's measured ceilings (products and copies: benchmarks.ceilings) in place of a data sheet

--json keeps what FILE holds of other presets, so that long runs can be split; the table is of all of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch

from benchmarks import ceilings
from effkern.data import build_dataset
from effkern.models import Decoder, DecoderConfig, count_parameters
from effkern.ops.distill.ceilings import Ceilings
from effkern.train.config import TrainConfig
from effkern.train.estimate_ranks import Cluster, RankEstimate, estimate_ranks
from effkern.train.loop import Trainer
from effkern.train.presets import PRESETS

RESULTS = Path(__file__).parent / "results" / "preset_estimates.json"
SECONDS = 1200
# Of a step.
LONG_S = 15.0
# glibc's malloc gives large blocks back to the system at once.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def scaled(name: str, rows: int, work: Path) -> TrainConfig:
    """The preset with one micro-batch of `rows` sequences a step, on this machine's own text."""
    config = PRESETS[name].config
    run = replace(
        config.run, out=str(work / name), device="cpu", precision="fp32", compile=False, tensorboard=False, plot=False
    )
    data = replace(config.data, path=str(work / "data"), batch_size=rows, micro_batch_size=0)
    return replace(config, data=data, run=run, teacher=replace(config.teacher, checkpoint=""))


def teacher_of(name: str) -> DecoderConfig | None:
    teacher = PRESETS[name].teacher
    return PRESETS[teacher].config.model if teacher else None


def cpu(threads: int) -> Cluster:
    """This machine, by its measured ceilings."""
    found = ceilings.Ceilings(ceilings.measure(torch.device("cpu"), [threads], ["float32"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rate, bandwidth = found.products["cpu", threads, "float32"], found.bandwidth["cpu", threads]
    kind = Ceilings(f"CPU, {threads} threads", {4: rate}, bandwidth, memory, is_cpu=True)
    return Cluster(1, kind, 1, 1.0, 1.0)


def predicted(name: str, rows: int, cluster: Cluster) -> RankEstimate:
    return estimate_ranks(scaled(name, rows, Path()), torch.float32, cluster, teacher_of(name))


def rows_that_fit(name: str, cluster: Cluster, limit: float, limit_s: float) -> int:
    """Sequences of a micro-batch: the preset's own number, else 1, else 0."""
    own = PRESETS[name].config.data.micro_rows
    numbers = predicted(name, own, cluster)
    if numbers.peak <= limit and numbers.step_s(teacher=True)[0] <= limit_s:
        return own
    return int(predicted(name, 1, cluster).peak <= limit)


# In a process of its own ----------------------------------------------------------------------------------------------


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def trainer_of(config: TrainConfig, teacher: DecoderConfig | None) -> Trainer:
    """With an untrained teacher."""
    trainer = Trainer(config, quiet=True)
    if teacher is not None and trainer.stage_one:
        trainer.teacher = Decoder(teacher, seed=1).eval().requires_grad_(False)
    return trainer


def measure(name: str, rows: int, steps: int, work: Path) -> dict[str, Any]:
    """Peak of this process, and seconds of each step."""
    config = scaled(name, rows, work)
    tiny = DecoderConfig(vocab_size=4096, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, mlp_size=32)
    data = replace(config.data, seq_len=32, batch_size=2)
    trainer_of(replace(config, model=tiny, data=data), None).step(0)
    before = status("VmRSS:")
    # Sets the high-water mark back to the present.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    trainer, seconds = trainer_of(config, teacher_of(name)), list[float]()
    for number in range(steps):
        start = time.perf_counter()
        trainer.step(number)
        seconds.append(time.perf_counter() - start)
    return {"peak": status("VmHWM:") - before, "seconds": seconds}


# The measurement ------------------------------------------------------------------------------------------------------


def record(name: str, rows: int, cluster: Cluster, a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Estimate and measurement of one preset; the estimate alone for rows = 0."""
    numbers = predicted(name, max(1, rows), cluster)
    config = PRESETS[name].config
    found: dict[str, Any] = {
        "preset": name, "rows": rows, "seq_len": config.data.seq_len, "parameters": count_parameters(config.model),
        "memory": {part: size for part, size in numbers.memory.items() if size}, "estimated_bytes": numbers.peak,
        "estimated_s": numbers.step_s(teacher=numbers.teacher_flops > 0)[0], "product_rate": cluster.kind.matrix[4],
        "bandwidth": cluster.kind.bandwidth, **runner.machine(), "threads": a.threads,
    }  # fmt: skip
    if not rows:
        return found
    exact = in_process(name, rows, 2, a.threads, work, RETURNING)
    found |= {"measured_bytes": exact["peak"], "measured_s": exact["seconds"][-1], "seconds": exact["seconds"]}
    if exact["seconds"][-1] < LONG_S:
        usual = in_process(name, rows, a.steps, a.threads, work, {})
        found |= {"process_bytes": usual["peak"], "measured_s": statistics.median(usual["seconds"][1:])}
        found |= {"seconds": usual["seconds"]}
    return found


def in_process(name: str, rows: int, steps: int, threads: int, work: Path, environment: dict[str, str]) -> Any:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.preset_estimates", f"--child={name}", f"--rows={rows}"]
    command += [f"--steps={steps}", f"--threads={threads}", f"--work={work}"]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"preset_estimates: {name}: status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, in the order of the presets."""
    lines = [
        "| preset | parameters | micro-batch | memory, MiB | estimate | ratio | process | step, s | estimate | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(records, key=lambda r: list(PRESETS).index(r["preset"])):
        size, seconds = r["estimated_bytes"], r["estimated_s"]
        if r["rows"]:
            peak, step = r["measured_bytes"], r["measured_s"]
            process = f"{r['process_bytes'] / 2**20:,.0f}" if "process_bytes" in r else "-"
            shown = (
                f"{peak / 2**20:,.0f} | {size / 2**20:,.0f} | {peak / size:.2f} | {process} | "
                f"{step:.3g} | {seconds:.3g} | {step / seconds:.2f}"
            )
        else:
            shown = f"does not fit | {size / 2**20:,.0f} | - | - | - | {seconds:.3g} | -"
        lines.append(f"| {r['preset']} | {r['parameters'] / 1e6:,.1f}M | {r['rows'] or 1} x {r['seq_len']} | {shown} |")
    return "\n".join(lines)


def kept(path: Path | None) -> dict[str, dict[str, Any]]:
    """Records of an earlier call, by preset."""
    return {r["preset"]: r for r in json.loads(path.read_text())} if path is not None and path.exists() else {}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preset_estimates", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=list(PRESETS), default=list(PRESETS), metavar="PRESET")
    parser.add_argument("--limit-gib", type=float, default=18.0, help="of the estimate; more is not tried")
    parser.add_argument("--limit-s", type=float, default=10.0, help="of the estimated step for the preset's own rows")
    parser.add_argument("--steps", type=int, default=3, help="2 or more; the first is not timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help=f"such as {RESULTS.relative_to(Path(__file__).parents[1])}")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    for name, low in (("steps", 2), ("threads", 1)):
        if getattr(a, name) < low:
            parser.error(f"--{name} must be at least {low}, got {getattr(a, name)}")
    if a.child:
        torch.set_num_threads(a.threads)
        print(json.dumps(measure(a.child, a.rows, a.steps, a.work)))
        return 0
    if not Path("/proc/self/clear_refs").exists():
        raise runner.Skip("peaks of resident memory are read from /proc of Linux")
    records, cluster = kept(a.json), cpu(a.threads)
    with tempfile.TemporaryDirectory() as folder:
        build_dataset(Path(folder) / "data", ["stdlib"], vocab_size=4096, max_bytes=4 << 20)
        for name in a.only:
            rows = rows_that_fit(name, cluster, a.limit_gib * 2**30, a.limit_s)
            records[name] = record(name, rows, cluster, a, Path(folder))
            print(table([records[name]]).splitlines()[-1], flush=True)
            if a.json:
                # Whole or as before: a call that is ended here loses no earlier one's records.
                temporary = a.json.with_name(f".{a.json.name}.tmp")
                temporary.write_text(json.dumps(list(records.values()), indent=1) + "\n")
                os.replace(temporary, a.json)
    print(f"\n{table(list(records.values()))}")
    return 0


if __name__ == "__main__":
    runner.told(lambda: sys.exit(main(sys.argv[1:])))
