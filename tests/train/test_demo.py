"""The demo in miniature: what the report holds, the same numbers twice, interruption, reuse of the corpus."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from effkern.models import count_parameters
from effkern.train import demo as module
from effkern.train.demo import DemoInterrupted, DemoPlan, arms, default_plan, place, run_demo


@pytest.fixture(scope="module")
def plan(base, salt, text):
    run = replace(base.run, eval_every=10, plot=False)
    model = replace(base.model, hidden_size=32, mlp_size=64)
    student = replace(salt, model=model, run=run, schedule=replace(salt.schedule, steps=30))
    teacher = replace(base, run=run, schedule=replace(base.schedule, steps=20))
    return DemoPlan(
        teacher, student, (str(text),), vocab_size=300, val_tokens=512, prompts=("alpha beta",), sample_tokens=5
    )


@pytest.fixture(scope="module")
def done(plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    return out, run_demo(out, seed=0, plan=plan, quiet=True)


def numbers(report):
    """The report without what depends on the clock."""
    return {key: value for key, value in report.items() if key != "timing"}


def test_report_holds_what_was_promised(plan, done, dataset):
    out, report = done
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["seed"] == 0
    assert len(report["corpus"]["manifest_hash"]) == 64
    assert set(report["versions"]) == {"python", "torch", "numpy"}
    for name, config in arms(place(plan, out, 0)).items():
        run = report["runs"][name]
        assert run["parameters"] == count_parameters(config.model)
        assert run["tokens"] == config.schedule.steps * 64
        assert [e["step"] for e in run["evals"]] == [0, 10, 20, 30][: 1 + config.schedule.steps // 10]
        assert all({"tokens", "loss", "accuracy", "bits_per_byte", "flops"} <= e.keys() for e in run["evals"])
        assert run["evals"][-1]["loss"] < run["evals"][0]["loss"]
        timing = report["timing"]["runs"][name]
        assert 0 < timing["loss_op_share"] < 1
        assert timing["wall_s"] >= timing["step_s"] * config.schedule.steps > 0
    assert report["timing"]["runs"]["salt"]["teacher_share"] > 0
    assert report["timing"]["runs"]["baseline"]["teacher_share"] == 0
    found = report["findings"]
    final = found["final"]
    gap = final["salt"]["loss"] - final["baseline"]["loss"]
    assert final["salt_minus_baseline"]["difference"] == pytest.approx(gap, abs=1e-12)
    assert found["at_switch"]["salt"] == report["runs"]["salt"]["evals"][1]["loss"]
    assert found["equal_flops"]["salt_extra_flops_share"] > 0
    assert len(found["buckets_of_teacher_confidence"]) == 5
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_students_start_alike_and_see_the_same_batches(done):
    runs = done[1]["runs"]
    assert runs["salt"]["evals"][0]["loss"] == runs["baseline"]["evals"][0]["loss"]
    assert runs["salt"]["weights_sha256"] != runs["baseline"]["weights_sha256"]


def test_markdown_says_what_the_numbers_say(done):
    out, report = done
    text = (out / "report.md").read_text()
    for name in ("teacher", "baseline", "salt"):
        assert f"{report['runs'][name]['final']['loss']:.4f}" in text
        assert f"{report['runs'][name]['parameters']:,}" in text
    assert "ONE seed" in text


def test_second_run_gives_the_same_numbers(plan, done, tmp_path):
    second = run_demo(tmp_path / "again", seed=0, plan=plan, quiet=True)
    assert numbers(second) == numbers(done[1])


def test_again_in_the_same_place_keeps_the_corpus_and_trains_again(plan, done, monkeypatch):
    out, report = done
    monkeypatch.setattr(module, "build_dataset", lambda *a, **k: pytest.fail("the corpus was built again"))
    started = []
    real = module.train
    monkeypatch.setattr(
        module, "train", lambda config, **k: started.append(Path(config.run.out).exists()) or real(config, **k)
    )
    again = run_demo(out, seed=0, plan=plan, quiet=True)
    assert started == [False] * 3
    assert numbers(again) == numbers(report)


def test_another_seed_gives_other_numbers(plan, done, tmp_path):
    other = run_demo(tmp_path / "seed", seed=1, plan=plan, quiet=True)
    assert other["corpus"] == done[1]["corpus"]
    assert other["runs"]["salt"]["weights_sha256"] != done[1]["runs"]["salt"]["weights_sha256"]


@pytest.mark.parametrize("arm", ["baseline", "salt"])
def test_interrupted_demo_goes_on(plan, done, tmp_path, monkeypatch, arm):
    from effkern.train.loop import Trainer

    real = Trainer.step

    def interrupt(self, i):
        if self.title == arm and i == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, i)

    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupt)
        with pytest.raises(DemoInterrupted, match=r"interrupted; what was trained is saved.*the same command again"):
            run_demo(out, seed=0, plan=plan, quiet=True)
    assert not (out / "report.json").exists()
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self, i: steps.append((self.title, i)) or real(self, i))
        report = run_demo(out, seed=0, plan=plan, quiet=True)
    assert steps[0] == (arm, 6)
    assert numbers(report) == numbers(done[1])


def test_a_folder_of_other_things_is_left_alone(plan, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"demo: out must be new or hold an earlier demo, got "):
        run_demo(tmp_path, plan=plan, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_default_plan_keeps_the_arms_comparable(tmp_path):
    runs = arms(default_plan(tmp_path, 3))
    baseline, salt = runs["baseline"], runs["salt"]
    same = replace(salt, schedule=baseline.schedule, run=replace(salt.run, out=baseline.run.out))
    assert same == baseline
    assert salt.schedule.steps == baseline.schedule.steps
    assert 0.17 <= salt.schedule.kd_steps / salt.schedule.steps <= 0.4
    assert {c.run.seed for c in runs.values()} == {c.data.seed for c in runs.values()} == {3}
