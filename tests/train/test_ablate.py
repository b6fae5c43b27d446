"""Ablations: which arms there are, that each is a run like any other, that done ones are kept, what the report says."""

import json
import os
import signal
import statistics
from dataclasses import replace

import pytest

from effkern import cli
from effkern.data import build_dataset, val_batches
from effkern.models import LaurelConfig, count_parameters
from effkern.train.ablate import Ablation, AblationInterrupted, is_done, run_ablation
from effkern.train.config import ScheduleConfig, TeacherConfig
from effkern.train.evaluation import evaluate
from effkern.train.features import FEATURES, arms, default_stages, parse_feature
from effkern.train.loop import Trainer
from effkern.train.mapping import differences
from effkern.train.presets import PRESETS
from effkern.train.restore import load_model, weights_digest
from effkern.train.runs import read_run
from effkern.train.soft_labels import LabelOptions, SoftLabelJob
from tests.train.fixtures import at

ALL = ("laurel", "looped", "shampoo", "salt")


@pytest.fixture
def student(base, teacher):
    """10 steps of two layers, the teacher in the first 4; a rank that fits."""
    model = replace(base.model, num_layers=3, laurel=LaurelConfig(rank=4))
    return replace(
        base,
        model=model,
        schedule=ScheduleConfig(steps=10, mode="salt", omega=0.5, kd_steps=4),
        teacher=TeacherConfig(checkpoint=str(teacher)),
        run=replace(base.run, checkpoint_every=0, eval_every=5),
    )


def test_arms_have_their_features_and_nothing_else(student):
    found = arms(student, [FEATURES[name] for name in ALL])
    assert list(found) == ["base", *ALL, "+".join(ALL)]
    base = found["base"]
    assert (base.model.residual, base.model.stack) == ("add", "plain")
    assert (base.optimizer.name, base.schedule.mode) == ("adamw", "baseline")
    for name, fields in (
        ("laurel", {"model.residual"}),
        ("looped", {"model.stack", "model.loop.stages"}),
        ("shampoo", {"optimizer.name"}),
        ("salt", {"schedule.mode", "schedule.kd_steps"}),
    ):
        changed = {line.split(":")[0] for line in differences(_plain(base), found[name])}
        assert changed == fields, name
    together = found["+".join(ALL)]
    assert together == replace(
        student,
        model=replace(found["looped"].model, residual="laurel"),
        optimizer=found["shampoo"].optimizer,
    )


def _plain(config):
    from dataclasses import asdict

    return asdict(config)


def test_the_full_grid_is_every_subset(student):
    found = arms(student, [FEATURES[name] for name in ("laurel", "shampoo", "salt")], "full")
    assert len(found) == 8
    assert len(set(map(repr, found.values()))) == 8
    assert list(found)[4:7] == ["laurel+shampoo", "laurel+salt", "shampoo+salt"]


def test_what_is_not_listed_stays_as_it_is(student):
    found = arms(student, [FEATURES["laurel"]])
    assert list(found) == ["base", "laurel"]
    assert all(arm.schedule == student.schedule for arm in found.values())


@pytest.mark.parametrize(("layers", "stages"), [(1, "1x2"), (2, "1x1,1x2"), (3, "1x1,1x2,1x1"), (12, "3x1,6x2,3x1")])
def test_default_stages(layers, stages):
    assert default_stages(layers) == stages


@pytest.mark.parametrize(
    ("features", "grid", "rule"),
    [
        ((), "each", "at least one"),
        (("salt", "salt"), "each", "each once"),
        (("sault",), "each", r"must be of \['laurel'.*got 'sault'"),
        (("salt=x.toml",), "each", "must be a new word"),
        (("salt",), "some", "grid must be each or full"),
        (("longer=longer.toml",), "each", "every arm must see 640 tokens, got 1,280 in 'longer'"),
    ],
)
def test_wrong_features_are_named(student, tmp_path, monkeypatch, features, grid, rule):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "longer.toml").write_text("[schedule]\nsteps = 20\n")
    with pytest.raises(ValueError, match=rule):
        arms(student, [parse_feature(text) for text in features], grid)


def test_a_stopped_ablation_goes_on_and_the_report_is_that_of_its_runs(student, tmp_path, monkeypatch, capsys):
    """SIGTERM in the middle of a run; then the same call trains what is missing, to the bits of single runs."""
    (tmp_path / "rate.toml").write_text("[optimizer]\nlr = 0.02\n")
    features = ("laurel", "salt", f"rate={tmp_path / 'rate.toml'}")
    ablation = Ablation(student, features, tmp_path / "out", seeds=2)
    began = []
    step = Trainer.step

    def watched(self, number):
        if not began or began[-1] != self.out:
            began.append(self.out)
        if len(began) == 4 and number == 6 and not stopped:
            stopped.append(self.out)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    stopped = []
    monkeypatch.setattr(Trainer, "step", watched)
    with pytest.raises(AblationInterrupted) as stop:
        run_ablation(ablation, quiet=True)
    assert stop.value.signum == signal.SIGTERM
    done, began[:] = began[:3], []
    report = run_ablation(ablation, quiet=True)
    arm_names = ["base", "laurel", "salt", "rate", "laurel+salt+rate"]
    assert list(report["arms"]) == arm_names
    # The stopped run went on, the three before it were left alone.
    assert began[0] == stopped[0]
    assert not set(done) & set(began)
    assert len(began) == 2 * len(arm_names) - 3
    runs = ablation.runs()
    for name, configs in runs.items():
        assert all(is_done(config) for config in configs)
        losses = [read_run(tmp_path / "out" / name / f"seed-{s}").evals[-1]["loss"] for s in (0, 1)]
        base = [read_run(tmp_path / "out" / "base" / f"seed-{s}").evals[-1]["loss"] for s in (0, 1)]
        arm = report["arms"][name]
        assert arm["loss"]["mean"] == pytest.approx(statistics.mean(losses), abs=1e-12)
        gaps = [a - b for a, b in zip(losses, base)]
        assert arm["difference"]["mean"] == pytest.approx(statistics.mean(gaps), abs=1e-12)
        assert arm["difference"]["error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2, abs=1e-12)
        assert arm["parameters"] == count_parameters(configs[0].model)
        assert (arm["teacher_share"] > 0) == ("salt" in name)
    assert report["tokens"] == 640
    # A run that was stopped and one that was not are the same.
    name, seed = stopped[0].parent.name, int(stopped[0].name.removeprefix("seed-"))
    alone = Trainer(at(runs[name][seed], tmp_path / "alone"), quiet=True)
    alone.run()
    assert weights_digest(load_model(stopped[0]).model) == weights_digest(alone.model)
    table = (tmp_path / "out" / "ablation.md").read_text()
    for name, arm in report["arms"].items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
        assert f"{arm['loss']['mean']:.4f} +- {arm['loss']['error']:.4f}" in line
    assert json.loads((tmp_path / "out" / "ablation.json").read_text())["arms"] == report["arms"]
    assert (tmp_path / "out" / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    # Another config in the same folder is refused, and nothing is lost.
    other = replace(ablation, config=replace(student, optimizer=replace(student.optimizer, lr=5e-3)))
    with pytest.raises(RuntimeError, match="belongs to another run"):
        run_ablation(other, quiet=True)
    assert is_done(runs["base"][0])


def test_the_teacher_is_trained_first_where_there_is_none(student, tmp_path):
    lost = replace(student, teacher=TeacherConfig(checkpoint=str(tmp_path / "none")))
    with pytest.raises(RuntimeError, match="no intact checkpoint"):
        run_ablation(Ablation(lost, ("salt",), tmp_path / "out", seeds=1), quiet=True)
    small = replace(student, model=replace(student.model, hidden_size=8), schedule=ScheduleConfig(steps=3))
    report = run_ablation(Ablation(lost, ("salt",), tmp_path / "out", seeds=1, teacher=small), quiet=True)
    assert load_model(tmp_path / "out" / "teacher").model.config.hidden_size == 8
    salt = read_run(tmp_path / "out" / "salt" / "seed-0")
    assert salt.config["teacher"]["checkpoint"] == str(tmp_path / "out" / "teacher")
    assert report["arms"]["salt"]["difference"]["error"] is None
    assert report["arms"]["salt"]["flops"] > report["arms"]["base"]["flops"]


def test_another_teacher_or_cache_is_refused_for_a_finished_run(student, teacher, dataset, tmp_path):
    """A finished run loads no teacher any more, so the ablation itself must compare."""
    live = Ablation(student, ("salt",), tmp_path / "live", seeds=1)
    run_ablation(live, quiet=True)
    again = at(student, tmp_path / "again", schedule__mode="baseline")
    Trainer(again, quiet=True).run()
    changed = replace(student, teacher=TeacherConfig(checkpoint=str(tmp_path / "again")))
    with pytest.raises(RuntimeError, match=r"had another teacher \(.*Choose another --out"):
        run_ablation(replace(live, config=changed), quiet=True)
    run_ablation(live, quiet=True)

    def cached(name, **options):
        given = LabelOptions(method="sampled", seq_len=16, device="cpu", precision="fp32", **options)
        SoftLabelJob(teacher, dataset.path, given).write(tmp_path / name)
        return replace(student, teacher=TeacherConfig(cache=str(tmp_path / name)))

    first, second = cached("first"), cached("second", seed=1)
    report = run_ablation(Ablation(first, ("salt",), tmp_path / "cached", seeds=2), quiet=True)
    assert read_run(tmp_path / "cached" / "salt" / "seed-1").trained[0]["divergence"] > 0
    assert report["arms"]["salt"]["teacher_share"] > 0
    with pytest.raises(RuntimeError, match="had another teacher"):
        run_ablation(Ablation(second, ("salt",), tmp_path / "cached", seeds=2), quiet=True)


def test_an_arm_on_other_data_is_measured_on_the_same_text(student, dataset, tmp_path):
    """Selected data, as a feature of one's own: the report's loss is not the one in that run's log."""
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text(f"item {i} of the list is alpha\n" * 60)
    tokenizer = dataset.path / dataset.manifest.tokenizer.file
    build_dataset(tmp_path / "few", [tmp_path / "text"], tokenizer=tokenizer, val_fraction=0.3)
    (tmp_path / "few.toml").write_text(f"[data]\npath = '{tmp_path / 'few'}'\n")
    feature = f"selected={tmp_path / 'few.toml'}"
    report = run_ablation(Ablation(student, ("laurel", feature), tmp_path / "out", seeds=1, grid="each"), quiet=True)
    out = tmp_path / "out" / "selected" / "seed-0"
    model = load_model(out).model
    batches = val_batches(dataset, 16, 4, student.run.eval_tokens)
    expected = evaluate(model, batches, dataset.bytes_per_token("val")).loss
    assert report["arms"]["selected"]["loss"]["mean"] == expected != read_run(out).evals[-1]["loss"]


def test_the_command(student, tmp_path, capsys, monkeypatch):
    """Values of the command line reach the runs, a dry run trains nothing, and wrong ones are named."""
    data, out = student.data.path, tmp_path / "out"
    file = tmp_path / "small.toml"
    file.write_text(
        "[model]\nvocab_size = 300\nhidden_size = 16\nnum_layers = 1\nnum_heads = 2\nnum_kv_heads = 1\nmlp_size = 24\n"
        "max_seq_len = 32\n[data]\nseq_len = 16\nbatch_size = 4\n[schedule]\nsteps = 4\n"
        '[run]\ndevice = "cpu"\nprecision = "fp32"\neval_tokens = 256\ntensorboard = false\nplot = false\n'
    )
    command = ["ablate", "--config", str(file), "--data.path", data, "--out", str(out), "--seeds", "1"]
    command += ["--features", "shampoo", "--run.seed", "7"]
    assert cli.main([*command, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(out / "base" / "seed-7"), str(out / "shampoo" / "seed-7")]
    assert not out.exists()
    assert cli.main(command) == 0
    assert "| shampoo |" in capsys.readouterr().out
    assert read_run(out / "shampoo" / "seed-7").config["optimizer"]["name"] == "shampoo"
    assert cli.main(command) == 0
    assert f"base seed-7: done in {out / 'base' / 'seed-7'}" in capsys.readouterr().out
    assert cli.main([*command, "--seeds", "0"]) == 1
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(command) == 1
    assert "ablate trains in one process" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ablate", "--dry-run", "--features", "salt"]) == 0
    assert capsys.readouterr().out.count(" 3 layers, adamw, salt") == 3


def test_presets_that_follow_papers_say_what_is_not_confirmed():
    papers = {name: preset for name, preset in PRESETS.items() if name.startswith("paper-")}
    assert {"paper-2.8b", "paper-middle-loop", "paper-laurel"} <= set(papers)
    assert all(preset.unconfirmed for preset in papers.values())
    # The published counts, in millions: embeddings and norms that are not published make up the rest.
    for name, millions in (("paper-c4-24", 157.20), ("paper-c4-28", 179.23), ("paper-laurel", 158.40)):
        assert count_parameters(papers[name].config.model) / 1e6 == pytest.approx(millions, rel=3e-3)
    added = count_parameters(papers["paper-laurel"].config.model) - count_parameters(papers["paper-c4-24"].config.model)
    assert added == 24 * (2 * 32 * 768 + 2)
    middle, plain = papers["paper-middle-loop"].config.model, papers["paper-24x1"].config.model
    assert (middle.depth, middle.num_layers, plain.depth) == (24, 12, 24)
