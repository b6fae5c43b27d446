"""`effkern runs`: what it reads of run directories is what the runs wrote."""

import json
import shutil
import subprocess
import sys

import pytest

from effkern import cli
from effkern.models import count_parameters
from effkern.train.checkpoint import list_checkpoints
from effkern.train.log import read_log
from effkern.train.loop import Trainer, train
from effkern.train.runs import compare_runs, find_runs, names_of, read_run
from tests.train.fixtures import at


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Two finished runs, one of them shorter and with another rate, and one that was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    train(at(base, folder / "a" / "long", schedule__steps=80, run__checkpoint_every=0), quiet=True)
    train(at(base, folder / "b" / "short", schedule__steps=60, run__checkpoint_every=0, optimizer__lr=2e-2), quiet=True)
    trainer = Trainer(at(base, folder / "b" / "stopped"), quiet=True)
    step = trainer.step

    def until_30(number):
        if number == 30:
            raise KeyboardInterrupt
        return step(number)

    trainer.step = until_30
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    return folder


def run(capsys, *arguments):
    assert cli.main(["runs", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_list_has_every_run_with_its_own_figures(folder, base, capsys):
    assert find_runs(folder) == [folder / "a" / "long", folder / "b" / "short", folder / "b" / "stopped"]
    found = json.loads(run(capsys, "list", folder, "--json"))
    assert [(r["step"], r["steps"], r["finished"]) for r in found] == [(80, 80, True), (60, 60, True), (28, 240, False)]
    for item in found:
        last = [r for r in read_log(folder / item["path"] / "log.jsonl") if r["kind"] == "eval"][-1]
        assert item["parameters"] == count_parameters(base.model)
        assert {k: item[k] for k in ("loss", "accuracy", "tokens")} == {
            k: last[k] for k in ("loss", "accuracy", "tokens")
        }
    shown = run(capsys, "list", folder)
    assert "80/80" in shown
    assert [line.split()[3] for line in shown.splitlines() if "/240" in line or "/80" in line] == [
        "finished",
        "stopped",
    ]
    assert f"{found[1]['loss']:.4f}" in shown


def test_a_run_is_running_as_long_as_its_process_lives(base, folder, tmp_path, capsys):
    """A process of its own, killed in the middle of a step."""
    out = tmp_path / "alive"
    shutil.copytree(folder / "b" / "stopped", out)
    code = (
        f"from pathlib import Path; from effkern.train.lock import RunLock; RunLock(Path({str(out)!r})).__enter__(); "
    )
    held = subprocess.Popen(
        [sys.executable, "-c", code + "print('held', flush=True); input()", "a run"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert held.stdout.readline() == "held\n"
        found = json.loads(run(capsys, "list", tmp_path, "--json"))[0]
        assert found["status"] == "running"
        assert found["process"].startswith(f"process {held.pid} on ")
        assert " running " in run(capsys, "list", tmp_path)
        assert f"step 28 of 240, running by process {held.pid}" in run(capsys, "show", out)
        with pytest.raises(
            ValueError, match=rf"in use by another process, got .*alive \(process {held.pid} on .*a run"
        ):
            train(at(base, out), quiet=True)
    finally:
        held.kill()
        held.communicate()
    assert json.loads(run(capsys, "list", tmp_path, "--json"))[0]["status"] == "stopped"
    assert "step 28 of 240, stopped" in run(capsys, "show", out)
    assert train(at(base, out, schedule__steps=240), quiet=True).finished
    assert read_run(out).status == "finished"


def test_show_has_settings_and_validations(folder, capsys):
    shown = run(capsys, "show", folder / "b" / "short")
    assert "step 60 of 60, finished" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert any("optimizer.lr" in line and "0.02" in line for line in lines)
    # The default.
    assert not any("optimizer.beta1" in line for line in lines)
    for record in read_run(folder / "b" / "short").evals:
        assert any(f"{record['loss']:.4f}" in line and f"{record['tokens']:,}" in line for line in lines)


def test_compare_names_differences_and_takes_losses_at_equal_tokens(folder, capsys):
    paths = [folder / "a" / "long", folder / "b" / "short"]
    found = json.loads(run(capsys, "compare", *paths, "--json"))
    assert found["settings"] == {"optimizer.lr": [1e-2, 2e-2], "schedule.steps": [80, 60]}
    assert found["runs"] == ["a/long", "b/short"]
    long, short = (read_run(path) for path in paths)
    at_40, at_80 = (next(r["loss"] for r in long.evals if r["step"] == s) for s in (40, 80))
    # The longer run has no validation at step 60: the middle of those at 40 and 80.
    assert found["equal_tokens"]["tokens"] == 60 * 64
    assert found["equal_tokens"]["loss"] == pytest.approx([(at_40 + at_80) / 2, short.evals[-1]["loss"]])
    difference = short.evals[-1]["loss"] - (at_40 + at_80) / 2
    assert found["equal_tokens"]["minus_first"] == pytest.approx([0.0, difference])
    shown = run(capsys, "compare", *paths)
    assert "loss at 3,840 tokens" in shown
    assert f"{difference:.4f}" in shown


def test_plot_draws_the_validations(folder, tmp_path, capsys, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.plot

    def plot(self, xs, ys, *rest, **style):
        drawn.append((style["label"], list(xs), list(ys)))
        return original(self, xs, ys, *rest, **style)

    monkeypatch.setattr(Axes, "plot", plot)
    assert "3 runs" in run(capsys, "plot", folder, "--out", tmp_path / "all.svg", "--x", "step", "--y", "accuracy")
    assert (tmp_path / "all.svg").read_text().startswith("<?xml")
    runs = [read_run(path) for path in find_runs(folder)]
    assert [name for name, _, _ in drawn] == names_of(runs) == ["a/long", "b/short", "b/stopped"]
    for (_, xs, ys), each in zip(drawn, runs):
        assert xs == [r["step"] for r in each.evals]
        assert ys == [r["accuracy"] for r in each.evals]
    run(capsys, "plot", folder / "a", "--out", tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


def test_a_damaged_checkpoint_is_passed_over_and_named(folder, tmp_path, capsys):
    shutil.copytree(folder / "b" / "stopped", tmp_path / "copy")
    newest = list_checkpoints(tmp_path / "copy" / "checkpoints")[-1]
    (newest / "meta.json").write_text((newest / "meta.json").read_text()[:100])
    found = read_run(tmp_path / "copy")
    assert found.step == 21
    assert newest.name in found.problems[0]
    assert "damaged" in run(capsys, "list", tmp_path)
    assert newest.name in run(capsys, "show", tmp_path / "copy")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["list", "nowhere"], "folder must exist, got nowhere"),
        (["show", "."], "must be a run directory"),
        (["compare", "{}/a/long"], "at least two run directories, got 1"),
        (["plot", "{}", "--out", "runs.txt"], "must end in .png, .svg or .pdf, got runs.txt"),
        (["plot", "."], "must hold a validation"),
    ],
)
def test_wrong_arguments_are_named(folder, tmp_path, arguments, rule, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs", *(a.format(folder) for a in arguments)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("effkern runs: error: ")
    assert rule in message


def test_a_run_without_validation_cannot_be_compared(folder, tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match=f"got none in {tmp_path}"):
        compare_runs([read_run(folder / "a" / "long"), read_run(tmp_path)])
