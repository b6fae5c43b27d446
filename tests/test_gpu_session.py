"""What a lent GPU is asked for: in parts that end within the ten minutes of one loan, each test file in one of them;
and what stays of a session that is stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

from benchmarks import gpu_session
from benchmarks.gpu_session import Outcome, Session, Step

ALL_PARTS = (*gpu_session.PARTS, gpu_session.TUNE)


@pytest.mark.parametrize("part", ALL_PARTS)
def test_every_part_ends_in_time(part):
    assert 0 < sum(step.seconds for step in gpu_session.steps(part, "build/gpu")) <= 540


def test_commands_name_files_and_modules_that_exist():
    for part in ALL_PARTS:
        for step in gpu_session.steps(part, "build/gpu"):
            for word in step.command:
                path = word.removeprefix("--ignore=")
                if path.startswith("tests/"):
                    assert (gpu_session.ROOT / path).exists(), path
                if path.startswith("benchmarks."):
                    stem = gpu_session.ROOT / path.replace(".", "/")
                    assert stem.with_suffix(".py").exists() or (stem / "__main__.py").exists(), path


def test_the_peers_take_the_targets_shapes():
    from benchmarks.peers.__main__ import family_of, override

    for step in gpu_session.steps("peers", "build/gpu"):
        op = step.command[step.command.index("--op") + 1]
        settings = step.command[step.command.index("--set") + 1 :]
        cases = family_of(op).cases("--full" not in step.command)
        found = [override(case, settings) for case in cases]
        for case in found:
            assert all(str(case[setting.split("=")[0]]) == setting.split("=")[1] for setting in settings), step.name
    shapes = " ".join(step.name for step in gpu_session.steps("peers", "build/gpu"))
    assert {"dim=4096", "dim=2048", "rows=8192", "vocab=128256"} <= set(shapes.split())


def command(program: str, seconds: int = 20, lines: bool = True, name: str = "step") -> Step:
    return Step(name, [sys.executable, "-c", program], seconds, lines)


LINE = '{"benchmark": "one", "variant": "v", "case": {}}'


def test_a_step_that_overruns_leaves_its_lines_and_no_process(tmp_path):
    pid = tmp_path / "pid"
    program = (
        f"import subprocess, sys, time; print('{LINE}'); "
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    found = gpu_session.run(command(program), 1.5, tmp_path / "running")
    assert not found.ok
    assert found.measurements == [json.loads(LINE)]
    assert "stopped after 2 s" in found.out
    assert found.seconds < 20
    deadline = time.monotonic() + 10
    # A killed orphan may be a zombie until its new parent looks.
    while time.monotonic() < deadline and _alive(int(pid.read_text())):
        time.sleep(0.05)
    assert not _alive(int(pid.read_text()))


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_step_is_recorded_in_three_files(tmp_path, capsys):
    session = Session(tmp_path, "NVIDIA H100 80GB", ["speed"], {"torch": "2.11"})
    steps = [
        command(f"print('{LINE}'); print('text')", name="measured"),
        command("raise SystemExit('broken')", name="broken"),
        command("print('never')", name="late"),
    ]  # fmt: skip
    steps[2].seconds = 0
    assert gpu_session.perform(session, steps, None, "") == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-NVIDIA-H100-80GB-speed", session.stem.name)
    whole = json.loads(session.file(".json").read_text())
    assert [(s["name"], s["ok"]) for s in whole["steps"]] == [("measured", True), ("broken", False), ("late", False)]
    assert whole["measurements"] == [json.loads(LINE)]
    assert session.file(".jsonl").read_text() == json.dumps(json.loads(LINE)) + "\n"
    text = session.file(".md").read_text()
    assert "## measured: ok" in text
    assert "broken" in text
    assert "## late: left out, 0 s" in text
    assert "no time was left" in text
    assert not session.file(".running").exists()
    assert "failed: broken\nno time was left for: late\n" in capsys.readouterr().out


def test_a_budget_cuts_what_comes_last(tmp_path):
    session = Session(tmp_path, "d", [], {})
    steps = [command("pass", name="first"), command(f"print('{LINE}'); import time; time.sleep(30)", name="second"),
             command("pass", name="third")]  # fmt: skip
    start = time.monotonic()
    assert gpu_session.perform(session, steps, 1.5, "") == gpu_session.INCOMPLETE
    assert time.monotonic() - start < 15
    assert [(o.name, o.state) for o in session.outcomes] == [("first", "ok"), ("second", "cut"), ("third", "left out")]
    assert len(session.outcomes[1].measurements) == 1
    # Its own limit is no budget.
    steps = [command("import time; time.sleep(30)", 1)]
    assert gpu_session.perform(Session(tmp_path, "d", [], {}), steps, 20, "") == 1


def test_half_a_line_is_no_measurement_and_stops_nothing(tmp_path):
    session = Session(tmp_path, "d", [], {})
    other = '{"date": "2026-11-22", "processor": "one"}'
    session.add(Outcome("cut", False, 1.0, f"{other}\n{LINE}\n{LINE[:30]}\nstopped after 5 s", True))
    session.add(Outcome("whole", True, 1.0, LINE, True))
    assert json.loads(session.file(".json").read_text())["measurements"] == [json.loads(LINE)] * 2


def test_a_session_without_parts_ends_in_time_with_the_targets_first(tmp_path, monkeypatch):
    everything = [step.name for part in gpu_session.PARTS for step in gpu_session.steps(part, "build/gpu")]
    found = gpu_session.all_steps("build/gpu")
    assert sorted(everything) == sorted(step.name for step in found)
    assert [step.name for step in found[:4]] == ["configure", "build", "doctor", "ceilings"]
    flags = [step.target for step in found[3:]]
    assert flags == sorted(flags, reverse=True)
    # They fit beside a build of a minute even where each of them takes all of its limit.
    assert sum(step.seconds for step in found if step.target) + 60 < gpu_session.BUDGET < 540
    names = " ".join(step.name for step in found if step.target)
    for needed in (
        "distill hidden",
        "distill hard",
        "laurel --variant=rw_lr",
        "peers distillation",
        "lora_rite",
        "roots",
    ):
        assert needed in names

    asked = []
    monkeypatch.setattr(
        gpu_session, "perform", lambda _, chosen, budget, path: asked.append((len(chosen), budget)) or 0
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "one")
    monkeypatch.setattr(gpu_session.signal, "signal", lambda *_: None)
    words = ["--out", str(tmp_path), "--wheels", str(tmp_path)]
    for more in ([], ["--parts", "build"], ["--parts", "build", "--budget", "60"], ["--budget", "60", "--tune"]):
        assert gpu_session.main([*words, *more]) == 0
    count = len(found)
    assert asked == [(count, gpu_session.BUDGET), (3, None), (3, 60.0), (count + 1, 60.0)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_measured_outlives_a_killed_session(tmp_path, number):
    sleeper = f"print('{LINE}', flush=True); import time; time.sleep(20)"
    program = f"""
import signal, sys
from pathlib import Path
from benchmarks.gpu_session import Session, Step, perform, stop
signal.signal(signal.SIGTERM, stop)
session = Session(Path({str(tmp_path)!r}), "d", [], {{}})
first = Step("first", [sys.executable, "-c", {f"print('{LINE}')"!r}], 20, True)
second = Step("second", [sys.executable, "-c", {sleeper!r}], 20, True)
sys.exit(perform(session, [first, second], None, ""))
"""
    environment = {**os.environ, "PYTHONPATH": str(gpu_session.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL)
    try:
        running, deadline = None, time.monotonic() + 60
        while time.monotonic() < deadline:
            running = next(iter(tmp_path.glob("*.running")), None)
            if running and list(tmp_path.glob("*.jsonl")) and LINE in running.read_text():
                break
            time.sleep(0.05)
        process.send_signal(number)
        status = process.wait(30)
    finally:
        process.kill()
    whole = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert whole["steps"][0]["name"] == "first"
    if number == signal.SIGTERM:
        assert status == 1
        assert [s["name"] for s in whole["steps"]] == ["first", "second (interrupted)"]
        assert len(whole["measurements"]) == 2
    else:
        assert len(whole["measurements"]) == 1
        assert LINE in running.read_text()


def test_pure_wheels_are_unpacked_and_others_left(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("peer-1.0-py3-none-any.whl", "native-1.0-cp312-cp312-linux_x86_64.whl"):
        with zipfile.ZipFile(wheels / name, "w") as archive:
            archive.writestr("peer_package/__init__.py", "answer = 42")
    target = tmp_path / "unpacked"
    assert gpu_session.unpack(wheels, target) == ["peer-1.0-py3-none-any.whl"]
    found = gpu_session.run(
        command("import peer_package; print(peer_package.answer)"), 20, tmp_path / "running", str(target)
    )
    assert found.ok
    assert found.out.strip() == "42"
    assert gpu_session.unpack(tmp_path / "none", target) == []


def test_shares_of_the_copy_bandwidth_are_added_once_it_is_known():
    def result(benchmark: str, **more) -> dict:
        return {"benchmark": benchmark, "variant": "copy", "case": {"device": "cuda"}, **more}

    ours, ceiling = result("laurel", gb_per_s=1500.0), result("ceilings", bytes=6e12, wall_low=2.0)
    assert gpu_session.with_copy_share([ours]) == [ours]
    found = gpu_session.with_copy_share([ceiling, ours, result("distill")])
    assert [r.get("of_copy") for r in found] == [None, 0.5, None]


def test_outcomes_without_lines_measure_nothing():
    assert Outcome("tests", True, 1.0, LINE).measurements == []


def test_without_a_device_nothing_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_session.main(["--out", str(tmp_path)]) == 2
    assert "must have a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        gpu_session.main(["--budget", "0"])
    assert "--budget must be positive, got 0" in capsys.readouterr().err
