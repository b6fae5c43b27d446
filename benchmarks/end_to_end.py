"""The reference trainer with each method switched on, beside the same training in plain torch with torch.compile.

    python -m benchmarks.end_to_end [--steps 43] [--json FILE] [--only base loops ...]

Every method trains the demo's student (256 wide, 3 layers; batches of 8 x 128 tokens) from the same weights on
the same batches with the same learning rates, once by this package's trainer and once by end_to_end_plain, which writes
the same mathematics in plain torch modules, one compiled function for model and loss, fused AdamW:

    base       cross entropy, AdamW                    laurel   RW+LR residuals of rank 16
    distill    omega = 1/2, forward KL to a teacher    loops    stages 1x1,1x3,1x1, each loop recomputed
    shampoo    one-sided, roots at every step          all      the four together

Each of the twelve is a process of its own; rounds of steps take turns, so that a drift of the machine reaches all. The
loss and the gradient norm of the first steps, and what these steps did to each parameter, must agree between the two
sides, or nothing is timed. Compiling, the teacher's training (150 steps) and validation are not in the times.

    tokens/s   of the median step                      step     rise of memory at the peak of a step, MiB
    loss       validation loss after all steps         state    weights, optimizer state and teacher, MiB
    to base    seconds until the validation loss is that of plain base at its end, over plain base's own seconds
"""

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from safetensors.torch import load_file, save_file

from effkern.data import PackedDataset, build_dataset, val_batches
from effkern.models import LaurelConfig
from effkern.models.loop_config import LoopConfig
from effkern.train.config import ScheduleConfig, TeacherConfig, TrainConfig
from effkern.train.presets import PRESETS

METHODS = ("base", "distill", "laurel", "loops", "shampoo", "all")
SIDES = ("plain", "effkern")
VOCAB = 4096
TEACHER_STEPS = 150
# Steps that the two sides must agree on, which also compile and warm up.
AGREED = 3
# Between two float32 implementations; Shampoo's roots are good to 1e-3.
BOUND = 1e-3
# What the first steps do to a parameter, relative, in the Frobenius norm. Sides that agree differ by up to 1e-3 with
# Shampoo's roots, the plain ones by float64 in these steps, and 2e-4 without. No weight decay changes 4e-2 and 1e-2 of
# it, another beta2 (0.9) 3e-2 and 1e-2.
CHANGE_BOUND = {"adamw": 2e-3, "shampoo": 5e-3}
ROUND = 10
EVAL_BATCHES = 4
# Nats above a loss that still count as having reached it: rounding alone keeps two sides apart.
REACHED = 1e-3


def configure(method: str, work: Path, steps: int, threads: int, vocab: int = VOCAB) -> TrainConfig:
    """The training of a method; both sides read it."""
    base = PRESETS["demo"].config
    model, optimizer = replace(base.model, vocab_size=vocab), base.optimizer
    schedule, teacher = ScheduleConfig(steps=steps), TeacherConfig()
    if method in ("laurel", "all"):
        model = replace(model, residual="laurel", laurel=LaurelConfig("rw+lr", rank=16))
    if method in ("loops", "all"):
        model = replace(model, stack="looped", loop=LoopConfig(stages="1x1,1x3,1x1"))
    if method in ("distill", "all"):
        schedule = replace(schedule, mode="rkd", omega=0.5)
        teacher = TeacherConfig(checkpoint=str(work / f"teacher-{vocab}"))
    if method in ("shampoo", "all"):
        optimizer = replace(optimizer, name="shampoo")
    run = replace(
        base.run, out=str(work / f"run-{method}"), seed=0, threads=threads, compile=True, precision="fp32",
        device="cpu", tensorboard=False, plot=False, eval_every=0, checkpoint_every=0,
    )  # fmt: skip
    data = replace(base.data, path=str(work / "data"))
    return replace(
        base, model=model, optimizer=replace(optimizer, warmup_steps=min(10, steps)), schedule=schedule,
        teacher=teacher, data=data, run=run,
    )  # fmt: skip


def prepare(work: Path, threads: int, vocab: int) -> None:
    """Corpus and teacher, if they are not there."""
    from effkern.train.loop import train

    try:
        PackedDataset(work / "data")
    except (FileNotFoundError, ValueError):
        build_dataset(work / "data", ["stdlib"], vocab_size=VOCAB, max_bytes=4 << 20, overwrite=True)
    base, teacher = configure("base", work, TEACHER_STEPS, threads, vocab), PRESETS["demo-teacher"].config
    model = replace(teacher.model, vocab_size=vocab)
    run = replace(base.run, out=str(work / f"teacher-{vocab}"), compile=False)
    train(replace(base, model=model, optimizer=teacher.optimizer, run=run), title="teacher")


# In a process of its own ----------------------------------------------------------------------------------------------


class Side:
    """One method on one side: steps, validation and memory."""

    def __init__(self, config: TrainConfig, plain: bool) -> None:
        from effkern.train.loop import Trainer
        from effkern.train.restore import load_teacher
        from effkern.train.step import to_device

        # The trainer's data, weights and teacher; of the plain side these are all that is used of it.
        trainer = Trainer(config, quiet=True)
        if config.teacher.checkpoint:
            trainer.teacher = load_teacher(config, trainer.inputs, trainer.device).model
        self.done = 0
        self.kept: list[Any] = [trainer.model, trainer.teacher, trainer.optimizer]
        batches = val_batches(trainer.dataset, config.data.seq_len, config.data.batch_size, None)
        rows = [to_device(batch, trainer.device) for _, batch in zip(range(EVAL_BATCHES), batches)]
        # Both sides begin with the trainer's weights, and have their parameters in one order.
        self.before = [p.detach().clone() for p in trainer.model.parameters()]
        self.step: Callable[[int], tuple[float, float]]
        self.validate: Callable[[], float]
        self.checked: Callable[[], None] = lambda: None
        if plain:
            from benchmarks.end_to_end_plain import PlainTrainer

            other = PlainTrainer(config, trainer.model, trainer.teacher)
            other.set_exact(True)
            self.checked = lambda: other.set_exact(False)
            self.kept = [other.model, other.teacher, *other.optimizers]
            self.step = lambda n: other.step(n, to_device(trainer.order.batch(n), trainer.device))
            self.validate = lambda: other.validate(rows)
            trainer.teacher = None
            return
        from effkern.train.evaluation import evaluate

        def step(number: int) -> tuple[float, float]:
            result, _ = trainer.step(number)
            return result.loss, result.grad_norm

        self.step = step
        self.validate = lambda: evaluate(trainer.model, [r.numpy() for r in rows], 1.0).loss

    def changes(self, path: Path) -> dict[str, Any]:
        """What the steps until now did to each parameter, by its place; in a file, as it is as large as they are."""
        now = self.kept[0].parameters()
        save_file({str(i): p.detach() - was for i, (p, was) in enumerate(zip(now, self.before))}, path)
        # What follows is timed, and its memory measured.
        self.before.clear()
        self.checked()
        return {"changes": str(path)}

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds and CPU seconds of each step, its loss and gradient norm."""
        wall, cpu, losses = [], [], []
        for _ in range(count):
            w, c = time.perf_counter(), time.process_time()
            losses.append(self.step(self.done))
            wall.append(time.perf_counter() - w)
            cpu.append(time.process_time() - c)
            self.done += 1
        return {"wall": wall, "cpu": cpu, "losses": losses}

    def memory(self) -> dict[str, int]:
        peak = runner.peak_memory(lambda: partial(self.step, self.done))
        return {"state": self.state_bytes(), "step": peak}

    def state_bytes(self) -> int:
        """Weights of model and teacher, and what the optimizers keep."""
        from benchmarks.lora_rite_step import state_bytes

        modules = sum(
            p.nbytes for m in self.kept if isinstance(m, torch.nn.Module) for p in (*m.parameters(), *m.buffers())
        )
        return modules + sum(state_bytes(o) for o in self.kept if isinstance(o, torch.optim.Optimizer))


def serve(side: Side) -> None:
    """Answers requests, one JSON object per line."""
    for line in sys.stdin:
        request = json.loads(line)
        if "steps" in request:
            answer: dict[str, Any] = side.steps(request["steps"])
        elif "changes" in request:
            answer = side.changes(Path(request["changes"]))
        elif "validate" in request:
            answer = {"loss": side.validate()}
        else:
            answer = side.memory()
        print(json.dumps(answer), flush=True)


class Worker:
    """The other end of a process that serves."""

    def __init__(self, method: str, side: str, a: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "benchmarks.end_to_end", f"--serve={method} {side}", f"--steps={a.steps}"]
        command += [f"--work={a.work}", f"--threads={a.threads}", f"--vocab={a.vocab}"]
        self.name = f"{method}, {side}"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, **request: Any) -> None:
        """Raises RuntimeError where the process has ended."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise RuntimeError(f"end_to_end: {self.name}: its process ended, status {self.process.wait()}") from None

    def receive(self, limit: float = 300.0) -> dict[str, Any]:
        """Raises RuntimeError where the process ends or does not answer within `limit` seconds."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            why = "its process ended" if ready else f"no answer within {limit:g} s"
            raise RuntimeError(f"end_to_end: {self.name}: {why}")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.receive()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# The measurement ------------------------------------------------------------------------------------------------------


def agree(method: str, plain: list[tuple[float, float]], ours: list[tuple[float, float]]) -> None:
    """No number on a wrong result: losses and gradient norms of the first steps."""
    for number, (a, b) in enumerate(zip(plain, ours)):
        # A comparison with NaN is false.
        if not all(abs(x - y) <= BOUND * abs(x) for x, y in zip(a, b)):
            raise SystemExit(
                f"end_to_end: {method}: step {number} differs by more than {BOUND:.0e} of itself (loss, gradient norm: "
                f"plain {a}, effkern {b}); nothing is timed"
            )


def agree_on_changes(method: str, plain: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    """No number on another optimizer: what the first steps did to each parameter. A loss of three steps hides it."""
    bound = CHANGE_BOUND["shampoo" if method in ("shampoo", "all") else "adamw"]
    for place, want in plain.items():
        error = (ours[place].double() - want.double()).norm().item()
        # A comparison with NaN is false.
        if not error <= bound * want.double().norm().item():
            raise SystemExit(
                f"end_to_end: {method}: the changes of parameter {place}, {list(want.shape)}, after {AGREED} steps "
                f"differ by more than {bound:.0e} of themselves; nothing is timed"
            )


def measure(a: argparse.Namespace) -> dict[tuple[str, str], dict[str, Any]]:
    """By (method, side): seconds and CPU seconds of every step, the validation curve, and memory."""
    workers: dict[tuple[str, str], Worker] = {}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    try:
        for method in a.only:
            workers.update({(method, side): Worker(method, side, a) for side in SIDES})
            # Both compile at the same time.
            for side in SIDES:
                workers[method, side].send(steps=AGREED)
            first = {side: workers[method, side].receive()["losses"] for side in SIDES}
            agree(method, first["plain"], first["effkern"])
            with tempfile.TemporaryDirectory() as folder:
                paths = {side: f"{folder}/{side}.safetensors" for side in SIDES}
                changes = {side: load_file(workers[method, side].ask(changes=paths[side])["changes"]) for side in SIDES}
            agree_on_changes(method, changes["plain"], changes["effkern"])
            print(f"{method}: both sides agree on {AGREED} steps", file=sys.stderr, flush=True)
        for key, worker in workers.items():
            found[key] = {"wall": [], "cpu": [], "curve": [(AGREED, worker.ask(validate=True)["loss"])]}
        steps = AGREED
        while steps < a.steps:
            count = min(ROUND, a.steps - steps)
            steps += count
            for key, worker in workers.items():
                answer = worker.ask(steps=count)
                found[key]["wall"] += answer["wall"]
                found[key]["cpu"] += answer["cpu"]
                found[key]["curve"].append((steps, worker.ask(validate=True)["loss"]))
            print(f"{steps} of {a.steps} steps", file=sys.stderr, flush=True)
        for key, worker in workers.items():
            found[key]["memory"] = worker.ask(memory=True)
    finally:
        for worker in workers.values():
            worker.close()
    return found


def seconds_to(curve: list[tuple[int, float]], step: float, loss: float) -> float | None:
    """Seconds until a validation curve, interpolated, is at `loss`, at `step` seconds a step; None: it never is."""
    loss += REACHED
    for (n, before), (m, after) in pairwise(curve):
        if before > loss >= after:
            return step * (n + (m - n) * (before - loss) / (before - after))
    return None


def summarise(found: dict[tuple[str, str], dict[str, Any]], tokens: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Figures by (method, side); `wall` and `cpu` are those of the median step."""
    rows = {}
    base = found.get(("base", "plain"))
    for key, f in found.items():
        step = statistics.median(f["wall"])
        row = {
            "wall": step, "wall_low": min(f["wall"]), "wall_high": max(f["wall"]), "cpu": statistics.median(f["cpu"]),
            "tokens_per_s": tokens / step, "loss": f["curve"][-1][1], "state_mib": f["memory"]["state"] / 2**20,
            "peak_mib": f["memory"]["step"] / 2**20, "curve": f["curve"],
        }  # fmt: skip
        if base is not None:
            goal = base["curve"][-1][1]
            reached = seconds_to(f["curve"], step, goal)
            own = seconds_to(base["curve"], statistics.median(base["wall"]), goal)
            row["to_base"] = None if reached is None or own is None else reached / own
        rows[key] = row
    return rows


def table(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    lines = [
        "| method | side | tokens/s | ms | spread | x plain | CPU x plain | step, MiB | state, MiB | loss | to base |",
        "| --- | --- " + "| ---: " * 9 + "|",
    ]
    for (method, side), r in rows.items():
        plain = rows[method, "plain"]
        to_base = "-" if r.get("to_base") is None else f"{r['to_base']:.2f}"
        lines.append(
            f"| {method} | {side} | {r['tokens_per_s']:.0f} | {1e3 * r['wall']:.0f} | {1e3 * r['wall_low']:.0f}-"
            f"{1e3 * r['wall_high']:.0f} | {r['wall'] / plain['wall']:.2f} | {r['cpu'] / plain['cpu']:.2f} | "
            f"{r['peak_mib']:.0f} | {r['state_mib']:.0f} | {r['loss']:.3f} | {to_base} |"
        )
    return "\n".join(lines)


def result_lines(rows: dict[tuple[str, str], dict[str, Any]], steps: int, vocab: int) -> list[str]:
    """One JSON object per method and side, and one per method for the plain base beside it."""
    lines = []
    for (method, side), row in rows.items():
        case = {"method": method, "steps": steps, "vocab": vocab, "device": "cpu"}
        record = {"benchmark": "end_to_end", "case": case, "variant": side, **row, **runner.machine()}
        lines.append(json.dumps(record))
        if side == "plain" and method != "base" and ("base", "plain") in rows:
            lines.append(json.dumps({**record, "variant": "plain base", **rows["base", "plain"]}))
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=43)
    parser.add_argument("--vocab", type=int, default=VOCAB, help="rows of the head; the tokenizer has 4096 tokens")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/end_to_end"), help="corpus and teacher; taken up again")
    parser.add_argument(
        "--json", nargs="?", const="-", default="", metavar="FILE", help="JSON lines on standard output, or in FILE"
    )
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    if a.steps <= AGREED:
        parser.error(f"--steps must be above {AGREED}, got {a.steps}")
    if a.vocab < VOCAB:
        parser.error(f"--vocab must be at least {VOCAB}, got {a.vocab}")
    if a.serve:
        method, side = a.serve.split()
        config = configure(method, a.work, a.steps, a.threads, a.vocab)
        torch.set_num_threads(a.threads)
        serve(Side(config, side == "plain"))
        return 0
    prepare(a.work, a.threads, a.vocab)
    tokens = PRESETS["demo"].config.data
    rows = summarise(measure(a), tokens.batch_size * tokens.seq_len)
    lines = result_lines(rows, a.steps, a.vocab)
    print("\n".join(lines) if a.json == "-" else f"{json.dumps(runner.machine())}\n{table(rows)}", flush=True)
    if a.json not in ("", "-"):
        path = Path(a.json)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines))
        os.replace(temporary, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
