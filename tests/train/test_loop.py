"""Runs: stages, resume, log, validation, divergence, and stored runs that do not fit."""

import gc
import json
import math
import os
import shutil
import signal
import weakref
from dataclasses import asdict, replace

import pytest
import torch

from effkern.data import build_dataset
from effkern.models import LaurelConfig
from effkern.train.checkpoint import Checkpoint, CheckpointError, list_checkpoints, load_checkpoint
from effkern.train.config import TrainConfig
from effkern.train.lock import RunLock
from effkern.train.log import read_log, truncate_log
from effkern.train.loop import Trainer, TrainingDiverged, train
from effkern.train.restore import Inputs, check_same_run, load_model, weights_digest
from tests.train.fixtures import at

TIMES = ("tokens_per_s", "wall_s")


def curve(out):
    """The log without what depends on the clock."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(out / "log.jsonl")]


def digest(out):
    return weights_digest(load_model(out).model)


@pytest.fixture(scope="module")
def whole(salt, tmp_path_factory):
    """An undisturbed SALT run."""
    out = tmp_path_factory.mktemp("whole")
    result = train(at(salt, out), quiet=True)
    assert result.finished
    return out, result


def stop_after(trainer, steps):
    """Make the loop see a stop request once `steps` steps are done."""
    real = trainer.step

    def step(i):
        found = real(i)
        if i + 1 == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    trainer.step = step
    return trainer


# Before, at, and after the switch at step 10.
@pytest.mark.parametrize("steps", [4, 10, 15])
def test_stop_and_resume_is_bit_exact(salt, whole, tmp_path, steps):
    config = at(salt, tmp_path)
    result = stop_after(Trainer(config, quiet=True), steps).run()
    assert (result.finished, result.signum, result.state.step) == (False, 15, steps)
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == f"step-{steps:08d}"
    resumed = train(config, quiet=True)
    assert resumed.finished
    assert curve(tmp_path) == curve(whole[0])
    assert digest(tmp_path) == digest(whole[0])
    assert resumed.evals == whole[1].evals


def test_same_seed_same_run(salt, whole, tmp_path):
    train(at(salt, tmp_path), quiet=True)
    assert curve(tmp_path) == curve(whole[0])
    train(at(salt, tmp_path / "other", run__seed=1), quiet=True)
    assert digest(tmp_path / "other") != digest(tmp_path)


def test_a_finished_run_is_left_as_it_is(salt, whole):
    before = curve(whole[0])
    result = train(at(salt, whole[0]), quiet=True)
    assert result.finished
    assert result.state.step == 20
    assert curve(whole[0]) == before
    assert result.evals == whole[1].evals


def test_log_and_result_hold_what_happened(whole):
    out, result = whole
    records = read_log(out / "log.jsonl")
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(1, 21))
    assert [r["omega"] for r in steps] == [0.5] * 10 + [0.0] * 10
    assert all(r["divergence"] > 0 for r in steps[:10])
    assert all(r["divergence"] == 0 and r["loss"] == r["ce"] for r in steps[10:])
    assert steps[-1]["total_tokens"] == 20 * 4 * 16
    # At the start, at the switch, at the end.
    assert [r["step"] for r in result.evals] == [0, 10, 20]
    assert steps[-1]["ce"] < steps[0]["ce"]
    summary = json.loads((out / "result.json").read_text())
    assert 0 < summary["loss_op_share"] < 1
    assert summary["final"] == result.evals[-1]
    assert 0 < result.teacher_share < 1


def test_teacher_is_freed_at_the_switch_and_the_optimizer_kept(salt, tmp_path):
    trainer = Trainer(at(salt, tmp_path), quiet=True)
    alive: list[bool] = []
    moments: list[torch.Tensor] = []
    real_step, real_unload = trainer.step, trainer.unload_teacher
    watch = []

    def step(i):
        if i == 0:
            watch.append(weakref.ref(trainer.teacher.embedding.weight))
        if i >= 9:
            gc.collect()
        alive.append(watch[0]() is not None)
        return real_step(i)

    def unload():
        parameter = trainer.model.norm.weight
        moments.append(trainer.optimizer.state[parameter]["exp_avg"].clone())
        real_unload()
        moments.append(trainer.optimizer.state[parameter]["exp_avg"].clone())
        moments.append(trainer.optimizer.state[parameter]["step"].clone())

    trainer.step, trainer.unload_teacher = step, unload
    trainer.run()
    assert alive == [True] * 10 + [False] * 10
    assert torch.equal(moments[0], moments[1])
    assert moments[2] == 10


def test_after_the_switch_no_teacher_is_needed(salt, teacher, whole, tmp_path):
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    config = at(salt, tmp_path / "run", teacher__checkpoint=str(copy))
    stop_after(Trainer(config, quiet=True), 12).run()
    shutil.rmtree(copy)
    train(config, quiet=True)
    assert curve(tmp_path / "run") == curve(whole[0])


def test_rkd_keeps_its_teacher_and_salt_with_all_steps_equals_it(salt, tmp_path):
    train(at(salt, tmp_path / "rkd", schedule__mode="rkd"), quiet=True)
    train(at(salt, tmp_path / "all", schedule__kd_steps=20), quiet=True)
    assert curve(tmp_path / "rkd") == curve(tmp_path / "all")
    assert digest(tmp_path / "rkd") == digest(tmp_path / "all")


def test_omega_zero_is_the_baseline_bitwise(salt, tmp_path):
    train(at(salt, tmp_path / "zero", schedule__omega=0.0, teacher__checkpoint="nowhere"), quiet=True)
    train(at(salt, tmp_path / "base", schedule__mode="baseline"), quiet=True)
    assert curve(tmp_path / "zero") == curve(tmp_path / "base")
    assert digest(tmp_path / "zero") == digest(tmp_path / "base")


def test_validation_is_the_mean_over_the_split(salt, whole, dataset):
    from effkern.data import val_batches

    model = load_model(whole[0]).model
    tokens = torch.from_numpy(next(iter(val_batches(dataset, 16, 16, 256))))
    logits = model.logits(model(tokens[:, :-1])).double()
    labels = tokens[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    last = whole[1].evals[-1]
    assert last["eval_tokens"] == 256
    assert last["loss"] == pytest.approx(loss, rel=1e-6)
    assert last["accuracy"] == (logits.argmax(-1) == labels).double().mean().item()
    assert last["bits_per_byte"] == pytest.approx(loss / math.log(2) / dataset.bytes_per_token("val"), rel=1e-6)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(salt, whole, tmp_path, capsys):
    config = at(salt, tmp_path)
    stop_after(Trainer(config, quiet=True), 16).run()
    newest = tmp_path / "checkpoints" / "step-00000016" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    result = train(config)
    expected = (
        f"skipped and renamed to damaged-step-00000016: checkpoint {newest.parent}: model.safetensors is cut short"
    )
    assert expected in capsys.readouterr().out
    left = sorted(path.name for path in newest.parent.parent.iterdir())
    assert left == ["damaged-step-00000016", "step-00000014", "step-00000020"]
    assert result.finished
    # The log had gone on to step 16; it was cut back to step 14 and has no step twice.
    assert curve(tmp_path) == curve(whole[0])


def test_another_config_is_refused_and_nothing_changes(salt, whole):
    before = sorted((p, p.read_bytes()) for p in whole[0].rglob("*") if p.is_file())
    other = at(salt, whole[0], optimizer__lr=0.5, data__seed=9)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)belongs to another run; nothing was overwritten.*data.seed: 0 -> 9\n  optimizer.lr: 0.01 -> 0.5",
    ):
        train(other, quiet=True)
    assert sorted((p, p.read_bytes()) for p in whole[0].rglob("*") if p.is_file()) == before


def test_another_dataset_or_teacher_is_refused(salt, base, text, tmp_path):
    config = at(salt, tmp_path / "run")
    stop_after(Trainer(config, quiet=True), 5).run()
    build_dataset(tmp_path / "data", [text], vocab_size=300, val_fraction=0.2, seed=1)
    with pytest.raises(CheckpointError, match=r"(?s)another run.*dataset \(hash\): \w+ -> \w+"):
        train(at(config, tmp_path / "run", data__path=str(tmp_path / "data")), quiet=True)
    train(at(base, tmp_path / "teacher", schedule__steps=3), quiet=True)
    with pytest.raises(CheckpointError, match=r"(?s)another run.*teacher \(hash\): \w+ -> \w+"):
        train(at(config, tmp_path / "run", teacher__checkpoint=str(tmp_path / "teacher")), quiet=True)


def test_restart_throws_the_stored_run_away(salt, whole, tmp_path):
    train(at(salt, tmp_path, optimizer__lr=0.5), quiet=True)
    train(at(salt, tmp_path, run__restart=True), quiet=True)
    assert curve(tmp_path) == curve(whole[0])


def test_free_fields_may_change_on_resume(salt, whole, tmp_path):
    stop_after(Trainer(at(salt, tmp_path), quiet=True), 6).run()
    result = train(at(salt, tmp_path, run__keep_last=1, run__checkpoint_every=4, run__eval_every=9), quiet=True)
    assert result.finished
    assert digest(tmp_path) == digest(whole[0])
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000020"]


def test_steps_that_are_not_finite_are_skipped_and_counted(salt, tmp_path, monkeypatch):
    from effkern.train import step as module

    real = module.linear_distill_loss
    calls = []

    def poisoned(hidden, *args, **kwargs):
        calls.append(1)
        return real(hidden * float("nan") if len(calls) in (3, 4, 9) else hidden, *args, **kwargs)

    monkeypatch.setattr(module, "linear_distill_loss", poisoned)
    result = train(at(salt, tmp_path, run__max_nonfinite=3), quiet=True)
    assert result.finished
    assert (result.state.skipped, result.state.nonfinite_in_a_row) == (3, 0)
    steps = [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in steps if not r["applied"]] == [3, 4, 9]
    assert all(torch.isfinite(p).all() for p in load_model(tmp_path).model.parameters())


def test_too_many_in_a_row_stop_the_run(salt, tmp_path, monkeypatch):
    from effkern.train import step as module

    real = module.linear_distill_loss
    calls = []

    def poisoned(hidden, *args, **kwargs):
        calls.append(1)
        return real(hidden * float("inf") if len(calls) > 9 else hidden, *args, **kwargs)

    monkeypatch.setattr(module, "linear_distill_loss", poisoned)
    with pytest.raises(
        TrainingDiverged, match=r"3 steps in a row .*not finite \(the last one: step 11\); none of them touched"
    ):
        train(at(salt, tmp_path, run__max_nonfinite=3), quiet=True)
    (stored,) = list_checkpoints(tmp_path / "checkpoints")
    assert stored.name == "step-00000007"
    assert load_checkpoint(stored).data["state"]["skipped"] == 0


def test_disk_full_stops_the_run_and_the_previous_checkpoint_resumes_it(salt, whole, tmp_path, monkeypatch):
    import errno

    from effkern.train import checkpoint as module

    real = module.save_file

    def full(tensors, path):
        if "step-00000014" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    config = at(salt, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(
            CheckpointError, match=r"step-00000014 could not be written.*No space left.*newest one is .*step-00000007"
        ):
            train(config, quiet=True)
    assert train(config, quiet=True).finished
    assert curve(tmp_path) == curve(whole[0])


def test_two_processes_cannot_share_a_run(salt, tmp_path):
    with RunLock(tmp_path), pytest.raises(ValueError, match=r"run.out must not be in use by another process"):
        train(at(salt, tmp_path), quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__checkpoint": ""}, r"teacher.checkpoint must name a trained model for schedule.mode=salt, got ''"),
        ({"model__vocab_size": 200}, r"model.vocab_size must be at least \d+ for .*, got 200"),
        ({"model__vocab_size": 400}, r"teacher.checkpoint must have vocab_size=400, got 300"),
        ({"run__device": "warp"}, r"run.device must be auto, cpu or cuda\[:index\], got 'warp'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(salt, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(at(salt, tmp_path / "run", **changes), quiet=True)
    left = [p.name for p in (tmp_path / "run").rglob("*")] if (tmp_path / "run").exists() else []
    assert left in ([], [".lock"])


def test_a_teacher_with_another_tokenizer_is_refused(salt, text, tmp_path):
    build_dataset(tmp_path / "data", [text], vocab_size=290, val_fraction=0.2)
    with pytest.raises(ValueError, match=r"teacher.checkpoint must have the tokenizer of data.path \(\w+\), got \w+"):
        train(at(salt, tmp_path / "run", data__path=str(tmp_path / "data")), quiet=True)


def test_log_survives_a_cut_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tr')
    assert [r["step"] for r in read_log(path)] == [1, 2]
    truncate_log(path, 1)
    assert path.read_text() == '{"kind": "train", "step": 1}\n'


def test_compiled_run_trains(salt, tmp_path, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, fullgraph: real(model, fullgraph=fullgraph, backend="aot_eager")
    )
    compiled = train(at(salt, tmp_path / "c", run__compile=True, schedule__steps=10), quiet=True)
    plain = train(at(salt, tmp_path / "p", schedule__steps=10), quiet=True)
    assert compiled.evals[-1]["loss"] == pytest.approx(plain.evals[-1]["loss"], rel=1e-5)


def test_tensorboard_and_plot(salt, tmp_path):
    train(at(salt, tmp_path, run__tensorboard=True, run__plot=True), quiet=True)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("train/ce")}
    expected = {r["step"]: r["ce"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"}
    assert logged == pytest.approx(expected, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_run_follows_the_cpu_run_and_resumes(salt, whole, tmp_path, precision):
    config = at(salt, tmp_path, run__device="cuda", run__precision=precision)
    stop_after(Trainer(config, quiet=True), 6).run()
    result = train(config, quiet=True)
    assert result.finished
    tolerance = 1e-3 if precision == "fp32" else 2e-2
    for found, expected in zip(result.evals, whole[1].evals):
        assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)


def test_a_run_that_is_older_than_a_field_resumes():
    """A field that the stored config lacks had its default; another value is another run."""
    config, inputs = TrainConfig(), Inputs("a", "b")
    stored = asdict(config)
    del stored["model"]["laurel"]
    old = Checkpoint(1, {}, {"config": stored, "inputs": asdict(inputs)})
    check_same_run(old, config, inputs)
    now = replace(config, model=replace(config.model, laurel=LaurelConfig(rank=8)))
    with pytest.raises(CheckpointError, match=r"model\.laurel\.rank: 32 -> 8"):
        check_same_run(old, now, inputs)
