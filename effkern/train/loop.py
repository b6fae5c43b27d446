"""The training loop: stages, validation, log, checkpoints, and what happens when something goes wrong."""

import gc
import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from effkern.data import PackedDataset, val_batches
from effkern.data.curation.selected_order import SelectedOrder
from effkern.models import Block, Decoder, LoopedStack, count_parameters, parse_stages
from effkern.models.layers import generator_for
from effkern.train.cached_teacher import CachedTeacher
from effkern.train.checkpoint import Checkpoint, CheckpointError, load_newest, save_checkpoint, set_aside
from effkern.train.config import FREE_PATHS, TrainConfig
from effkern.train.dashboard import dashboard_for
from effkern.train.device import choose_device, choose_precision, set_threads
from effkern.train.evaluation import EvalResult, evaluate
from effkern.train.feed import Feed, order_of
from effkern.train.lock import RunLock
from effkern.train.log import NoLog, RunLog, read_log
from effkern.train.mapping import flatten
from effkern.train.optimizer import build_optimizer, parameter_report
from effkern.train.parallel import ALONE, device_of_rank, join, versions
from effkern.train.progress import Reporter
from effkern.train.restore import Inputs, RunState, Stored, check_same_run, load_teacher, placement, restore, snapshot
from effkern.train.schedules import learning_rate, omega_at, teacher_steps
from effkern.train.signals import StopRequest
from effkern.train.step import StepResult, to_device, train_step
from effkern.train.timing import StepTimer
from effkern.train.wandb_log import require_wandb


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were not finite."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    out: Path
    finished: bool
    signum: int | None
    """The signal that ended it early, or None."""
    parameters: int
    state: RunState
    evals: list[dict[str, Any]]
    """Validation records in order: step, tokens, loss, accuracy, bits_per_byte."""

    @property
    def loss_op_share(self) -> float:
        """Share of the measured step time that the loss op took, forward and backward."""
        return self.state.loss_s / self.state.timed_s if self.state.timed_s else 0.0

    @property
    def teacher_share(self) -> float:
        """Share of the measured step time of the whole run that the teacher's forward pass took."""
        return self.state.teacher_s / self.state.timed_s if self.state.timed_s else 0.0


class Trainer:
    """One run: made from a config, driven by `run`. Tests and the demo hold it; the CLI calls `train`."""

    adapters = False
    """The model is a checkpoint with adapters."""
    outputs: tuple[str, ...] = (
        "checkpoints", "tensorboard", "log.jsonl", "curves.png", "tokenizer.json", "result.json", "wandb.json", "wandb",
    )  # fmt: skip
    """Where a run directory keeps what it writes; `restart` removes exactly these."""

    def __init__(self, config: TrainConfig, *, title: str = "train", quiet: bool = False) -> None:
        if config.lora.rank and not self.adapters:
            raise ValueError(f"lora.rank must be 0 to train a whole model (effkern finetune), got {config.lora.rank}")
        if self.adapters and config.distributed.mode not in ("none", "ddp"):
            raise ValueError(f"distributed.mode must be none or ddp to train adapters, got {config.distributed.mode!r}")
        self.config, self.title, self.quiet = config, title, quiet
        self.out = Path(config.run.out)
        if config.run.wandb:
            require_wandb(config.run.wandb)
        set_threads(config.run)
        self.device = device_of_rank(choose_device(config.run.device), config)
        self.dtype = choose_precision(config.run.precision, self.device)
        self.parallel = join(config, self.device)
        settings = {f"config {key}": value for key, value in flatten(config).items() if key not in FREE_PATHS}
        self.parallel.check_equal({**versions(), "precision": str(self.dtype), **settings})
        self.parallel.together(self._open)
        self.model = self._model()
        self.forward = self.parallel.wrap(self.model)
        if config.run.compile:
            alone = self.parallel is ALONE
            found = compiled(self.model, whole=alone)
            self.forward = found if alone else self.forward
        self.optimizer = self._optimizer()
        self.stored: Stored = self.model
        """What a checkpoint holds of the model."""
        self.state = RunState()
        self.teacher: Decoder | None = None
        self.cached: CachedTeacher | None = None
        self.stage_one = teacher_steps(config.schedule)
        self.feed = Feed(self.order, config.schedule.steps, config.data.workers)
        self.signum: int | None = None
        self.groups = parameter_report(self.model, self.optimizer)
        self._notes: list[str] = self.groups if config.optimizer.name != "adamw" else []
        self._saved_step = -1

    def _open(self) -> None:
        """The data, and whether the config fits them."""
        config = self.config
        self.dataset = PackedDataset(config.data.path)
        if self.dataset.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size must be at least {self.dataset.vocab_size} for {config.data.path}, "
                f"got {config.model.vocab_size}"
            )
        _check_gate(config)
        self.inputs = Inputs.of(self.dataset)
        self.order = order_of(config, self.dataset, self.parallel.rank, self.parallel.world)
        if isinstance(self.order, SelectedOrder):
            self.inputs = replace(self.inputs, selection=self.order.selection.hash)

    def _model(self) -> Decoder:
        return Decoder(self.config.model, seed=self.config.run.seed, device=self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.config.optimizer, self.parallel.root_group)

    def run(self) -> TrainResult:
        """Train from the newest checkpoint, or from step 0, to the last step, a signal, or an error."""
        with RunLock(self.out, self.parallel), StopRequest() as stop:
            self._begin()
            self.parallel.check_equal({"inputs": asdict(self.inputs), "step": self.state.step})
            first, steps, run = self.state.step, self.config.schedule.steps, self.config.run
            quiet = self.quiet or not self.parallel.is_main
            log: RunLog | NoLog = NoLog()
            if self.parallel.is_main:
                log = RunLog(self.out, first or -1, run.tensorboard, wandb=run.wandb, settings=asdict(self.config))
            report = dashboard_for(self.title, steps, first, self.stage_one, quiet=quiet)
            if isinstance(log, RunLog):
                log.watch = report.record
            for text in self._notes:
                report.note(text)
            self.feed.note = report.note
            try:
                self._loop(stop, log, report)
            except RuntimeError as error:
                lost = self.parallel.lost(error, f"after step {self.state.step}")
                if lost is None:
                    raise
                raise lost from error
            finally:
                self.feed.close()
                log.close()
                report.close()
            result = self._finish(self.signum)
        # What holds the group goes before the group does.
        self.forward = self.model
        self.parallel.close()
        return result

    def _begin(self) -> None:
        """Resume or start over; load the teacher if stage 1 needs it. Nothing is written before all is checked."""
        checkpoints = self.out / "checkpoints"
        found = None if self.config.run.restart else self._newest(checkpoints)
        self.parallel.together(lambda: self._open_teacher(found))
        if self.teacher is not None:
            self.parallel.shard_teacher(self.teacher)
        if found is not None:
            stored = found.data["inputs"]
            self.inputs = replace(self.inputs, teacher=stored["teacher"], labels=stored.get("labels", ""))
            self.state = self.parallel.together(lambda: restore(found, self.stored, self.optimizer))
            self._saved_step = found.step
            self._notes += self.parallel.on_main(lambda: _set_aside(found))
            self._notes.append(f"resumed {found.path} at step {found.step}")
        self.parallel.on_main(lambda: self._prepare(found is None))

    def _newest(self, checkpoints: Path) -> Checkpoint | None:
        """The newest intact checkpoint, read into the memory where it belongs."""
        if not self.parallel.sharded:
            return self.parallel.together(lambda: load_newest(checkpoints))
        from effkern.train.sharded import newest, read

        found = newest(checkpoints, self.parallel)
        if found is not None:
            check_same_run(found, self.config, self.inputs)
            read(found, placement(self.stored, self.optimizer), self.parallel)
        return found

    def _open_teacher(self, found: Checkpoint | None) -> None:
        if found is not None:
            check_same_run(found, self.config, self.inputs)
        first = found.step if found else 0
        if first < self.stage_one and self.config.teacher.cache:
            self.cached = CachedTeacher(self.config, self.order, range(first, self.stage_one), self.device)
            self.inputs = replace(self.inputs, labels=self.cached.hash)
        elif first < self.stage_one:
            loaded = load_teacher(self.config, self.inputs, self.device)
            self.inputs = replace(self.inputs, teacher=loaded.weights_hash)
            self.teacher = loaded.model
        if found is not None:
            check_same_run(found, self.config, self.inputs)

    def _prepare(self, new: bool) -> None:
        """What is written before the first step."""
        if new and self.config.run.restart:
            for name in self.outputs:
                path = self.out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        # With its tokenizer a run directory is all that `effkern generate` needs.
        shutil.copyfile(self.dataset.path / self.dataset.manifest.tokenizer.file, self.out / "tokenizer.json")

    def _loop(self, stop: StopRequest, log: RunLog | NoLog, report: Reporter) -> None:
        config, state = self.config, self.state
        wall, cpu = time.monotonic() - state.wall_s, time.process_time() - state.cpu_s
        rate_ema = 0.0
        if state.step == 0:
            log.write("eval", 0, self.validate())
            if config.optimizer.name != "adamw":
                log.write("groups", 0, {"lines": self.groups})
        while state.step < config.schedule.steps:
            self.signum = self.parallel.stop(stop.signum)
            if self.signum is not None:
                break
            step = state.step
            if (self.teacher or self.cached) is not None and step >= self.stage_one:
                self.unload_teacher()
                report.note(f"step {step}: stage 2, teacher unloaded")
            result, timer = self.step(step)
            state.step += 1
            state.tokens += result.tokens
            state.wall_s, state.cpu_s = time.monotonic() - wall, time.process_time() - cpu
            speed = result.tokens / timer.total
            rate_ema = speed if rate_ema == 0 else 0.9 * rate_ema + 0.1 * speed
            self._count(result)
            if state.step % config.run.log_every == 0 or not result.applied:
                log.write("train", state.step, self._record(step, result, rate_ema))
            if not result.applied:
                report.note(f"step {step}: not finite, skipped (loss {result.loss}, gradient norm {result.grad_norm})")
            self._stop_if_diverged()
            if self._due(config.run.eval_every) or state.step == self.stage_one:
                log.write("eval", state.step, self.validate())
            state.wall_s, state.cpu_s = time.monotonic() - wall, time.process_time() - cpu
            if config.run.checkpoint_every and state.step % config.run.checkpoint_every == 0:
                self.save()
            report.update(state.step, f"loss {result.ce:.4f} {rate_ema:,.0f} tok/s")
        if state.step != self._saved_step:
            self.save()

    def step(self, step: int) -> tuple[StepResult, StepTimer]:
        """Compute step number `step` on its batch."""
        config = self.config
        timer = StepTimer(self.device, self.device.type != "cuda" or (step + 1) % max(10, config.run.log_every) == 0)
        omega = omega_at(config.schedule, step)
        labels = None
        if self.cached is not None and omega > 0:
            with timer.measure("teacher"):
                labels = self.cached.labels(step)
        if config.model.loop.init == "noise" or config.lora.dropout:
            # The only draws that use the default generators.
            name = f"step {step}" if self.parallel.rank == 0 else f"step {step} rank {self.parallel.rank}"
            torch.manual_seed(generator_for(config.run.seed, name).initial_seed())
        result = train_step(
            self.model,
            self.forward,
            self.optimizer,
            to_device(self.feed.batch(step), self.device),
            config,
            teacher=self.teacher,
            labels=labels,
            omega=omega,
            rate=learning_rate(config.optimizer, config.schedule.steps, step),
            dtype=self.dtype,
            timer=timer,
            step=step,
            parallel=self.parallel,
        )
        if timer.enabled:
            self.state.timed_s += timer.total
            self.state.loss_s += timer.loss
            self.state.teacher_s += timer.teacher
        return result, timer

    def validate(self) -> dict[str, Any]:
        """Loss, accuracy and bits per byte on the validation split, with the tokens seen so far."""
        data = self.config.data
        batches = val_batches(self.dataset, data.seq_len, data.micro_rows, self.config.run.eval_tokens or None)
        result: EvalResult = evaluate(
            self.model, batches, self.dataset.bytes_per_token("val"), self.dtype, self.parallel
        )
        return {**result.as_dict(), "eval_tokens": result.tokens, "tokens": self.state.tokens}

    def unload_teacher(self) -> None:
        """Free the memory of the teacher or of its labels; student and optimizer are not touched."""
        self.teacher = self.cached = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        checkpoint = snapshot(self.stored, self.optimizer, self.state, self.config, self.inputs)
        self._saved_step = self.state.step
        root, keep = self.out / "checkpoints", self.config.run.keep_last
        if self.parallel.sharded:
            from effkern.train.sharded import save_sharded

            return save_sharded(root, checkpoint, keep, self.parallel)
        return self.parallel.on_main(lambda: save_checkpoint(root, checkpoint, keep))

    def _due(self, every: int) -> bool:
        return self.state.step == self.config.schedule.steps or (every > 0 and self.state.step % every == 0)

    def _count(self, result: StepResult) -> None:
        self.state.nonfinite_in_a_row = 0 if result.applied else self.state.nonfinite_in_a_row + 1
        self.state.skipped += not result.applied

    def _stop_if_diverged(self) -> None:
        if self.state.nonfinite_in_a_row >= self.config.run.max_nonfinite:
            raise TrainingDiverged(
                f"{self.state.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite "
                f"(the last one: step {self.state.step - 1}); none of them touched a parameter. "
                f"Lower optimizer.lr or look at the data; checkpoints are in {self.out / 'checkpoints'}"
            )

    def _record(self, step: int, result: StepResult, speed: float) -> dict[str, Any]:
        schedule, optimizer = self.config.schedule, self.config.optimizer
        return {
            **asdict(result),
            "omega": omega_at(schedule, step),
            "lr": learning_rate(optimizer, schedule.steps, step),
            "total_tokens": self.state.tokens,
            "tokens_per_s": speed,
            "wall_s": self.state.wall_s,
        }

    def _finish(self, signum: int | None) -> TrainResult:
        finished = self.state.step == self.config.schedule.steps
        records = self.parallel.on_main(lambda: read_log(self.out / "log.jsonl"))
        evals = [record for record in records if record["kind"] == "eval"]
        result = TrainResult(
            self.out, finished, None if finished else signum, count_parameters(self.config.model), self.state, evals
        )
        if finished and self.parallel.is_main:
            summary = {
                "state": asdict(self.state),
                "loss_op_share": result.loss_op_share,
                "final": evals[-1] if evals else None,
            }
            (self.out / "result.json").write_text(json.dumps(summary, indent=1))
            if self.config.run.plot:
                from effkern.train.plots import plot_run

                plot_run(records, self.out / "curves.png")
        return result


def _set_aside(found: Checkpoint) -> list[str]:
    return [f"skipped and renamed to {set_aside(path).name}: {text}" for path, text in found.problems.items()]


def _check_gate(config: TrainConfig) -> None:
    loop, mode = config.model.loop, config.schedule.mode
    if loop.exit_gate and not loop.exit_beta:
        raise ValueError(f"model.loop.exit_beta must be positive to train an exit gate, got {loop.exit_beta}")
    if loop.exit_gate and sum(stage.looped for stage in parse_stages(loop.stages)) > 1:
        raise ValueError(f"model.loop.stages must have one looped stage to train an exit gate, got {loop.stages!r}")
    if loop.exit_gate and mode != "baseline":
        raise ValueError(f"schedule.mode must be baseline to train an exit gate, got {mode!r}")


def compiled(model: Decoder, *, whole: bool = True) -> Any:
    """The model's forward pass, compiled: as one graph if `whole`, or layer by layer where ranks share it, so that
    their collectives are in no graph, and where stages loop, so that no number of loops compiles anything."""
    if whole and not isinstance(model.stack, LoopedStack):
        return torch.compile(model, fullgraph=True)
    for module in model.stack.modules():
        if isinstance(module, Block):
            module.compile(fullgraph=True)
    return model


def train(config: TrainConfig, *, title: str = "train", quiet: bool = False) -> TrainResult:
    """Run `config` to its end; resumes what config.run.out holds.

    Raises:
        ValueError, CheckpointError: the config, data, teacher or stored run does not fit; nothing was overwritten.
        TrainingDiverged: run.max_nonfinite steps in a row were not finite.
    """
    return Trainer(config, title=title, quiet=quiet).run()


__all__ = ["CheckpointError", "TrainResult", "Trainer", "TrainingDiverged", "train"]
