"""Labels from a teacher to a cache to a student: the same losses as the live teacher, and refusals before step 0."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from effkern import cli
from effkern.data import BatchOrder, build_dataset
from effkern.data.order import num_windows
from effkern.data.soft_labels import SoftLabelCache
from effkern.train import cached_teacher
from effkern.train.checkpoint import CheckpointError
from effkern.train.config import ScheduleConfig, TeacherConfig
from effkern.train.log import read_log
from effkern.train.loop import Trainer, train
from effkern.train.restore import load_model
from effkern.train.soft_labels import LabelOptions, SoftLabelJob, windows_of_steps
from tests.train.fixtures import at

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 300


def options(**changes) -> LabelOptions:
    return replace(LabelOptions(device="cpu", precision="fp32", batch_windows=8), **changes)


def make(teacher: Path, dataset, out: Path, **changes) -> SoftLabelCache:
    SoftLabelJob(teacher, dataset.path, options(**changes)).write(out)
    return SoftLabelCache(out)


def with_cache(config, cache: Path, **teacher):
    """`config` with `cache` in place of its live teacher."""
    temperature = teacher.pop("temperature", config.teacher.temperature)
    return replace(config, teacher=TeacherConfig(cache=str(cache), temperature=temperature, **teacher))


def losses(out: Path) -> np.ndarray:
    return np.array(
        [[r["loss"], r["ce"], r["divergence"]] for r in read_log(out / "log.jsonl") if r["kind"] == "train"]
    )


@pytest.fixture(scope="module")
def whole(teacher, dataset, tmp_path_factory) -> Path:
    """Every id of every token of the first 10 steps of `salt`, at its temperature."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    make(teacher, dataset, out, method="topk", k=VOCAB, temperature=0.5, steps=10, batch_size=4)
    return out


@pytest.fixture(scope="module")
def live(salt, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("live")
    train(at(salt, out), quiet=True)
    return out


@pytest.mark.parametrize("micro", [0, 2])
def test_full_labels_train_like_the_live_teacher(salt, whole, live, tmp_path, micro):
    """Up to the quantisation: with h the step of the log-probabilities, |loss - live| <= (e^(h/2) - 1) E[-log q]."""
    config = with_cache(at(salt, tmp_path, data__micro_batch_size=micro), whole)
    train(config, quiet=True)
    got, truth = losses(tmp_path), losses(live)
    step = SoftLabelCache(whole).spec.codec.step
    assert step == 32 / 2**15
    # -log q is at most 3 nats over the uniform distribution's here; later steps also carry what the first differed by.
    bound = np.expm1(step / 2) * (np.log(VOCAB) + 3)
    assert np.abs(got[0] - truth[0]).max() <= bound
    assert np.abs(got - truth).max() <= 5 * bound
    assert (truth[:10, 2] > 100 * bound).all()
    # After the switch there is no teacher in either.
    assert (got[10:, 2] == 0).all()


@pytest.mark.parametrize(
    ("made", "read"),
    [
        ({"method": "sampled", "draws": 100}, {}),
        ({"method": "stratified", "k": 20, "draws": 50}, {}),
        ({"method": "topk", "k": 30}, {"cache_kind": "tail_bucket"}),
        ({"method": "topk", "k": 30}, {"cache_kind": "truncated"}),
    ],
    ids=["sampled", "stratified", "tail_bucket", "truncated"],
)
def test_every_kind_trains_near_the_live_teacher(salt, teacher, dataset, live, tmp_path, made, read):
    cache = make(teacher, dataset, tmp_path / "cache", temperature=0.5, steps=10, batch_size=4, **made)
    assert (cache.spec.method, cache.spec.temperature) == (made["method"], 0.5)
    config = with_cache(at(salt, tmp_path / "run"), cache.path, **read)
    result = train(config, quiet=True)
    reference = read_log(live / "log.jsonl")[-1]
    assert result.evals[-1]["loss"] == pytest.approx(reference["loss"], abs=0.1)
    # Nothing of the teacher's network is there, and the first steps learned from its labels.
    assert (losses(tmp_path / "run")[:10, 2] > 0).all()


def test_labels_are_the_live_teachers(salt, teacher, dataset, tmp_path):
    """Entries against a forward pass of the teacher on the trainer's own batch."""
    cache = make(teacher, dataset, tmp_path / "cache", method="topk", k=7, temperature=0.5, steps=3, batch_size=4)
    order = BatchOrder(dataset, seq_len=16, batch_size=4, seed=salt.data.seed)
    model = load_model(teacher).model
    for step in range(3):
        tokens = torch.from_numpy(order.batch(step))
        logp = (model.logits(model(tokens[:, :-1])).flatten(0, 1) / 0.5).log_softmax(-1)
        expected = logp.topk(7)
        got = cache.read(order.indices(step))
        assert (torch.from_numpy(got.ids) == expected.indices).float().mean() > 0.99
        np.testing.assert_allclose(got.logprobs, expected.values.numpy(), atol=cache.spec.codec.step / 2 + 1e-4)
        tail = 1 - expected.values.exp().sum(-1)
        np.testing.assert_allclose(got.tail, tail.numpy(), rtol=2e-3, atol=1e-6)


def test_no_teacher_is_loaded_or_run(salt, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("effkern.train.loop.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    trainer = Trainer(with_cache(at(salt, tmp_path), whole), quiet=True)
    reads = []
    real = cached_teacher.CachedTeacher.labels
    monkeypatch.setattr(
        cached_teacher.CachedTeacher, "labels", lambda self, step: reads.append(step) or real(self, step)
    )
    trainer.run()
    assert trainer.teacher is None
    assert trainer.cached is None
    assert reads == list(range(10))


def interrupted(config) -> None:
    """Run `config` up to step 6."""
    trainer = Trainer(config, quiet=True)
    real = trainer.step

    def stops(step):
        if step == 6:
            raise KeyboardInterrupt
        return real(step)

    trainer.step = stops
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def test_resume_compares_the_cache(salt, whole, teacher, dataset, tmp_path):
    config = with_cache(at(salt, tmp_path / "run", run__checkpoint_every=4), whole)
    interrupted(config)
    other = make(teacher, dataset, tmp_path / "other", method="sampled", temperature=0.5, steps=10, batch_size=4)
    for wrong in (with_cache(config, other.path), replace(config, teacher=salt.teacher)):
        with pytest.raises(CheckpointError, match=r"(labels|teacher) \(hash\): .* -> [0-9a-f]{12}"):
            train(wrong, quiet=True)
    # The same labels elsewhere are the same run.
    moved = tmp_path / "moved"
    whole_copy = SoftLabelCache(whole)
    SoftLabelJob(teacher, dataset.path, options(method="topk", k=VOCAB, temperature=0.5, steps=10, batch_size=4)).write(
        moved
    )
    assert SoftLabelCache(moved).hash == whole_copy.hash
    train(with_cache(config, moved), quiet=True)
    undisturbed = tmp_path / "undisturbed"
    train(with_cache(at(salt, undisturbed), whole), quiet=True)
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(undisturbed))
    # A run that began with a live teacher does not go on with labels, whoever made them.
    begun = at(salt, tmp_path / "begun", run__checkpoint_every=4)
    interrupted(begun)
    with pytest.raises(CheckpointError, match=r"labels \(hash\): none -> [0-9a-f]{12}"):
        train(with_cache(begun, whole), quiet=True)


REFUSALS = {
    "temperature": (
        {"teacher__temperature": 1.0},
        r"teacher.temperature must be that of teacher.cache, 0.5, .*got 1.0",
    ),
    "seq_len": ({"data__seq_len": 8}, r"packing \(seq_len\): 16 in the cache, 8 asked for"),
    "vocab": ({"model__vocab_size": 320}, r"teacher.cache must have vocab_size=320, got 300"),
    "more_steps": ({"schedule__kd_steps": 11}, r"labels for steps 0 to 10, got none for window \d+ of step 10"),
    "order": ({"data__seed": 5}, r"must hold labels for steps 0 to 9, got none for window \d+ of step \d"),
    "batch": ({"data__batch_size": 5}, r"must hold labels for steps 0 to 9, got none for window \d+ of step \d"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_does_not_fit_is_refused_before_the_first_step(salt, whole, tmp_path, changes, message):
    config = at(with_cache(salt, whole), tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        train(config, quiet=True)
    assert not (tmp_path / "run" / "log.jsonl").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_cache_for_other_shards_is_refused(salt, whole, text, dataset, tmp_path):
    """Of the same tokenizer, and of another one."""
    sources, tokenizer = sorted(text.glob("*.txt")), dataset.path / "tokenizer.json"
    other = build_dataset(tmp_path / "other", sources[:30], tokenizer=tokenizer, val_fraction=0.2)
    config = at(with_cache(salt, whole), tmp_path / "run", data__path=str(other.path))
    with pytest.raises(ValueError, match=r"dataset \(hash of its shards\): \w{12} in the cache, \w{12} asked for"):
        train(config, quiet=True)
    other = build_dataset(tmp_path / "another", sources[:30], vocab_size=290, val_fraction=0.2)
    config = at(config, tmp_path / "run", data__path=str(other.path))
    with pytest.raises(ValueError, match=r"tokenizer \(hash\): [0-9a-f]{12} in the cache, [0-9a-f]{12}"):
        train(config, quiet=True)


def test_unfinished_caches_are_refused(salt, whole, tmp_path):
    for name in ("spec.json", "windows.bin"):
        (tmp_path / "half").mkdir(exist_ok=True)
        (tmp_path / "half" / name).write_bytes((whole / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="an unfinished cache"):
        train(with_cache(at(salt, tmp_path / "run"), tmp_path / "half"), quiet=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        train(with_cache(at(salt, tmp_path / "run"), tmp_path / "nowhere"), quiet=True)


def test_config_names_one_teacher(salt):
    with pytest.raises(ValueError, match=r"teacher.cache must be empty where teacher.checkpoint='a' is given, got 'b'"):
        TeacherConfig(checkpoint="a", cache="b")
    with pytest.raises(ValueError, match=r"teacher.cache_kind must be one of .*got 'best'"):
        TeacherConfig(cache_kind="best")  # type: ignore[arg-type]


def test_a_cache_of_all_windows_serves_every_order(salt, teacher, dataset, tmp_path):
    cache = make(teacher, dataset, tmp_path / "cache", method="sampled", draws=20)
    assert cache.spec.num_windows == num_windows(dataset, "train", 16)
    for seed in (1, 2):
        config = with_cache(at(salt, tmp_path / f"{seed}", data__seed=seed), cache.path, temperature=1.0)
        config = replace(config, schedule=ScheduleConfig(steps=4, mode="rkd", omega=1.0))
        assert train(config, quiet=True).finished


def test_windows_of_steps_is_the_order_of_first_use(dataset):
    order = BatchOrder(dataset, seq_len=16, batch_size=7, seed=3)
    few = windows_of_steps(order, 3)
    assert few.tolist() == [i for step in range(3) for i in order.indices(step).tolist()]
    every = windows_of_steps(order, 10**9)
    assert np.array_equal(np.sort(every), np.arange(order.num_windows))
    assert every[:21].tolist() == few.tolist()


def test_estimate_comes_near_the_size(teacher, dataset, tmp_path):
    job = SoftLabelJob(teacher, dataset.path, options(method="sampled", draws=30, shard_tokens=4096))
    estimate = job.estimate(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    manifest = job.write(tmp_path / "cache").manifest
    assert estimate.bytes == pytest.approx(manifest.bytes, rel=0.05)
    assert manifest.bytes < estimate.most
    assert estimate.tokens_per_s > 0
    assert estimate.free > 0
    fixed = SoftLabelJob(teacher, dataset.path, options(method="topk", k=5, steps=2, batch_size=3))
    assert fixed.estimate(tmp_path).bytes == pytest.approx(fixed.write(tmp_path / "topk").manifest.bytes, rel=0.02)


OPTION_ERRORS = {
    "steps_alone": ({"steps": 3}, "steps and batch_size must be given together, got 3 and 0"),
    "k_of_sampled": ({"k": 3}, "k must be 0 for method=sampled, got 3"),
    "draws_of_topk": ({"method": "topk", "draws": 3}, "draws must be 0 for method=topk, got 3"),
    "negative": ({"draws": -1}, "draws must be at least 0, got -1"),
    "shard": ({"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
    "method": ({"method": "best"}, "method must be one of sampled, topk, stratified, got 'best'"),
    "temperature": ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
    "length": ({"seq_len": 64}, "teacher must have max_seq_len >= seq_len=64, got 32"),
}


@pytest.mark.parametrize(("changes", "message"), OPTION_ERRORS.values(), ids=OPTION_ERRORS.keys())
def test_option_errors(teacher, dataset, changes, message):
    with pytest.raises(ValueError) as caught:
        SoftLabelJob(teacher, dataset.path, options(**changes))
    assert message in str(caught.value)


def command(teacher, dataset, out, *more) -> list[str]:
    fixed = ["--device", "cpu", "--precision", "fp32", "--shard-tokens", "1024", "--batch-windows", "4"]
    paths = ["--teacher", str(teacher), "--data", str(dataset.path), "--out", str(out)]
    return ["data", "soft-labels", *paths, *fixed, *more]


def test_cli(teacher, dataset, tmp_path, capsys):
    out = tmp_path / "cache"
    assert cli.main(command(teacher, dataset, out, "--dry-run")) == 0
    text = capsys.readouterr().out
    assert "expected" in text
    assert "all logits in float16" in text
    assert not out.exists()
    assert cli.main(command(teacher, dataset, out, "--steps", "30", "--batch-size", "4")) == 0
    cache = SoftLabelCache(out)
    assert (cache.spec.method, cache.spec.draws, cache.spec.num_windows) == ("sampled", 50, 120)
    text = capsys.readouterr().out
    assert "soft-labels 120/120" in text
    assert f"{cache.manifest.bytes:,} bytes" in text
    assert cli.main(command(teacher, dataset, out, "--steps", "30", "--batch-size", "4")) == 0
    assert "2 of 2 files kept" in capsys.readouterr().out
    assert cli.main(command(teacher, dataset, out, "--draws", "20")) == 1
    assert "effkern data: error: soft labels: out must hold no cache of another kind" in capsys.readouterr().err
    assert cli.main(command(teacher, dataset, out, "--draws", "20", "--overwrite")) == 0
    assert SoftLabelCache(out).spec.draws == 20


@pytest.mark.slow
def test_killed_command_goes_on_to_the_same_bytes(teacher, dataset, tmp_path):
    """kill -9, then SIGTERM, then to the end: bit-identical to a run that nothing disturbed."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    SoftLabelJob(teacher, dataset.path, options(shard_tokens=1024, batch_windows=4, draws=50)).write(whole)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    line = [sys.executable, "-m", "effkern", *command(teacher, dataset, out, "--draws", "50")]

    def start():
        return subprocess.Popen(
            line, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    shards = 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start()
        deadline = time.monotonic() + 240
        while len(list(out.glob("labels-*.bin"))) <= shards:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(number)
        text, _ = process.communicate(timeout=120)
        if number == signal.SIGTERM:
            assert process.returncode == 128 + signal.SIGTERM
            assert "finished files are kept, the same command goes on" in text
        shards = len(list(out.glob("labels-*.bin")))
        assert not (out / "manifest.json").exists()
    process = start()
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    assert "files kept" in text
    names = {p.name for path in (whole, out) for p in path.iterdir() if not p.name.startswith(".")}
    assert all((whole / name).read_bytes() == (out / name).read_bytes() for name in names)
