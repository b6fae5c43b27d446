"""The live dashboard, its plain forms, and Weights & Biases with a module that stands in for it."""

import io
import json
import sys
import types
from dataclasses import replace

import pytest
from rich.console import Console

from effkern.train.dashboard import BLOCKS, DashboardReporter, dashboard_for, peak_memory, sparkline
from effkern.train.log import read_log
from effkern.train.loop import Trainer, train
from effkern.train.progress import LineReporter, SilentReporter
from tests.train.fixtures import at


def shown(report) -> str:
    """One frame as plain text."""
    console = Console(file=io.StringIO(), width=100)
    console.print(report._render())
    return console.file.getvalue()


def test_the_dashboard_shows_what_the_log_gets(salt, tmp_path, monkeypatch):
    stream = io.StringIO()
    made = []

    def dashboard(title, total, step, stage_one, *, quiet):
        console = Console(file=stream, force_terminal=True, width=100)
        made.append(DashboardReporter(title, total, step, stage_one, console))
        return made[-1]

    monkeypatch.setattr("effkern.train.loop.dashboard_for", dashboard)
    frames = {}
    original = DashboardReporter.update

    def update(self, step, text):
        original(self, step, text)
        frames[step] = shown(self)

    monkeypatch.setattr(DashboardReporter, "update", update)
    train(at(salt, tmp_path, run__eval_every=5), title="salt")
    records = read_log(tmp_path / "log.jsonl")
    for step in (4, 20):
        last = next(r for r in records if r["kind"] == "train" and r["step"] == step)
        seen = [r for r in records if r["kind"] == "eval" and r["step"] <= step][-1]
        for text in (
            f"{step}/20",
            f"{last['ce']:.4f}",
            f"{last['lr']:.3e}",
            f"{last['tokens_per_s']:,.0f}",
            f"{last['total_tokens']:,}",
            f"{last['grad_norm']:.3f}",
            f"{seen['loss']:.4f}",
            f"{100 * seen['accuracy']:.2f}%",
            "MiB",
            "ETA",
        ):
            assert text in frames[step], text
    assert "1 of 2, teacher until 10" in frames[4]
    assert "0.500" in frames[4]
    assert "2 of 2, no teacher" in frames[20]
    assert sum(c in BLOCKS for c in frames[20]) == 20
    assert "step 10: stage 2, teacher unloaded" in stream.getvalue()


@pytest.mark.parametrize(("stage_one", "text"), [(0, "1 of 1, no teacher"), (50, "1 of 1, teacher")])
def test_a_dashboard_without_records_has_no_figures(stage_one, text):
    report = DashboardReporter("run", 50, 10, stage_one, Console(file=io.StringIO(), force_terminal=True, width=100))
    report.close()
    frame = shown(report)
    assert text in frame
    assert "10/50" in frame


def test_elsewhere_lines_or_nothing(capsys):
    assert isinstance(dashboard_for("t", 1, 0, 0), LineReporter)
    silent = dashboard_for("t", 1, 0, 0, quiet=True)
    assert isinstance(silent, SilentReporter)
    silent.record("train", 1, {})
    assert capsys.readouterr().out == ""


def test_sparkline_is_the_means_of_stretches():
    assert sparkline([], 8) == ""
    assert sparkline([float("nan"), float("inf")], 8) == ""
    assert sparkline([2.0, 2.0], 8) == BLOCKS[0] * 2
    assert sparkline([0.0, 0.0, 7.0, 7.0, 3.0, float("nan"), 5.0], 3) == BLOCKS[0] + BLOCKS[7] + BLOCKS[4]
    assert 0 < peak_memory() < 1 << 42


class FakeRun:
    def __init__(self, **given):
        self.given, self.records, self.finished = given, [], False

    def define_metric(self, name, step_metric):
        self.metric = (name, step_metric)

    def log(self, values):
        self.records.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module `wandb` that keeps what it is told."""
    module = types.ModuleType("wandb")
    module.runs = []

    def init(**given):
        module.runs.append(FakeRun(**given))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_number_and_a_resumed_run_keeps_its_id(base, tmp_path, wandb):
    config = at(base, tmp_path / "run", schedule__steps=8, run__wandb="papers", run__checkpoint_every=4)
    first = Trainer(config, quiet=True)
    save = first.save

    def stop_after_saving():
        save()
        raise KeyboardInterrupt

    first.save = stop_after_saving
    with pytest.raises(KeyboardInterrupt):
        first.run()
    train(config, quiet=True)
    begun, resumed = wandb.runs
    assert begun.finished
    assert resumed.finished
    assert begun.metric == ("*", "step")
    assert begun.given["project"] == "papers"
    assert begun.given["config"]["optimizer"]["lr"] == 1e-2
    assert begun.given["id"] == resumed.given["id"] == json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    sent = {}
    for values in begun.records + resumed.records:
        sent.setdefault(values["step"], {}).update(values)
    for record in read_log(tmp_path / "run" / "log.jsonl"):
        kind, step = record.pop("kind"), record.pop("step")
        for name, value in record.items():
            assert sent[step][f"{kind}/{name}"] == value
    train(replace(config, run=replace(config.run, restart=True)), quiet=True)
    assert wandb.runs[-1].given["id"] != begun.given["id"]


def test_wandb_is_not_imported_unless_named_and_then_missed_by_name(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = at(base, tmp_path / "run", schedule__steps=2)
    train(config, quiet=True)
    with pytest.raises(ImportError, match=r"effkern\[wandb\]"):
        train(at(config, tmp_path / "run", run__wandb="papers", run__restart=True), quiet=True)
    # Before anything is thrown away.
    assert (tmp_path / "run" / "result.json").exists()
