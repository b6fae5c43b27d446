"""The suite's other commands: cost against size, baselines, entries for pytest-benchmark, `effkern bench`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import baseline, ceilings, harness, scaling, suite
from benchmarks.case import Huge, Op, Work, WrongResult

ROOT = Path(__file__).parents[1]
SIZES = (2, 4, 8, 16, 32)


def test_the_exponent_of_a_power_law_is_found_exactly():
    exact = scaling.fit(SIZES, [3e-4 * n**1.5 for n in SIZES])
    assert exact == pytest.approx((1.5, 0.0, 1.5), abs=1e-12)


def test_exponent_and_error_are_those_of_least_squares():
    times = [1.0, 2.3, 3.7, 9.1, 15.0]
    found = scaling.fit(SIZES, times)
    slope, covariance = np.polyfit(np.log(SIZES), np.log(times), 1, cov=True)
    assert found.exponent == pytest.approx(slope[0])
    assert found.error == pytest.approx(covariance[0, 0] ** 0.5)
    assert found.last == pytest.approx(np.log2(15.0 / 9.1))


@pytest.mark.parametrize(("sizes", "times"), [((1, 2), (1, 2)), ((3, 3, 3), (1, 2, 3)), ((1, 2, 3), (1, 2))])
def test_too_few_points_have_no_exponent(sizes, times):
    with pytest.raises(ValueError, match="sizes must be three or more, not all the same, with a time each, got"):
        scaling.fit(sizes, times)
    with pytest.raises(ValueError, match="must be > 0"):
        scaling.fit((1, 2, 3), (1.0, 0.0, 2.0))


def test_costs_are_printed_with_their_exponent(tmp_path, capsys):
    path = tmp_path / "scaling.jsonl"
    words = ["scaling", "--op", "batched_eigh", "--rounds", "1", "--least", "0", "--json", str(path)]
    assert command.main(words) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| batched_eigh")]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(suite.load("batched_eigh").scaling)
    by_count = [line for line in lines if line["case"]["against"] == "count"]
    found = scaling.fit([line["case"]["count"] for line in by_count], [line["cpu"] for line in by_count])
    assert by_count[0]["exponent"] == pytest.approx(found.exponent)
    assert f"| {found.exponent:.2f} +- {found.error:.2f} | {found.last:.2f} |" in rows[1]


def fake(huge) -> Op:
    return Op("fake", "", (), ("a",), lambda case: None, lambda case, names: None, lambda case: Work(1), {}, huge=huge)  # type: ignore[arg-type,return-value]


def test_huge_calls_are_made_where_memory_is_enough(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "available_memory", lambda: 8 << 30)

    def wrong() -> None:
        raise WrongResult("the last row")

    right = fake(lambda: Huge(4 << 30, "rows", lambda: None))
    assert scaling.huge(right) == "fake: rows, 4.0 GiB: right in 0 s"
    too_large = fake(lambda: Huge((4 << 30) + 1, "rows", wrong))
    assert scaling.huge(too_large) == "fake: rows, 4.0 GiB: left out, as 0.5 of the free memory is 4.0 GiB"
    monkeypatch.setattr(suite, "load", lambda name: fake(lambda: Huge(1, "rows", wrong)))
    assert command.main(["scaling", "--huge", "--op", "laurel"]) == 1
    assert "FAILED: the last row" in capsys.readouterr().out


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Baselines of two ops, and what the measurements will find."""
    path = tmp_path / "cpu.json"
    cases = {name: baseline.case_of(suite.load(name)) for name in ("laurel", "label_rank")}
    held = {name: {"case": case, "ratios": {"effkern": 1.0}} for name, case in cases.items()}
    path.write_text(json.dumps({"machine": baseline.machine(), "ratios": held}))
    found = {"laurel": [1.1], "label_rank": [1.4, 1.3, 1.2]}

    def ratios(op, case, attempts, rounds):
        return [{"effkern": found[op.name].pop(0)} for _ in range(attempts)]

    monkeypatch.setattr(baseline, "ratios", ratios)
    return path, found


def run(path, *more):
    return command.main(["baseline", "--op", "label_rank", "laurel", "--file", str(path), *more])


def test_a_slowdown_is_printed_and_fails_nothing(recorded, capsys):
    path, _ = recorded
    assert run(path) == 0
    said = capsys.readouterr().out
    assert "| label_rank | effkern | 1.00 | 1.20 | 1.20 | SLOWER |" in said
    assert "| laurel | effkern | 1.00 | 1.10 | 1.10 |  |" in said
    assert "1 ratios more than 15% above" in said


def test_what_seems_slower_is_measured_again(recorded, capsys):
    path, found = recorded
    found["label_rank"] = [1.4, 1.3, 1.1]
    assert run(path) == 0
    assert "| label_rank | effkern | 1.00 | 1.10 | 1.10 |  |" in capsys.readouterr().out
    assert found["label_rank"] == []


def test_nothing_stops_a_comparison(recorded, monkeypatch, capsys):
    path, found = recorded
    found["laurel"] = []
    held = json.loads(path.read_text())
    held["ratios"]["label_rank"]["case"]["rows"] = 1
    held["machine"]["processor"] = "another"
    path.write_text(json.dumps(held))
    assert run(path) == 0
    said = capsys.readouterr().out
    assert "| label_rank | | | | | not measured: its case is another one now; --write makes its baseline anew |" in said
    assert "| laurel | | | | | not measured: pop from empty list |" in said
    assert "with care: processor is " in said
    assert "that of the baselines another" in said
    assert run(path, "--seconds", "-1") == 0
    assert "not measured: -1 s are over" in capsys.readouterr().out
    path.write_text("{")
    assert run(path) == run(path.with_name("none")) == 0
    assert capsys.readouterr().err.count("no usable baselines in") == 2


def test_written_baselines_are_medians_and_keep_other_ops(recorded, monkeypatch):
    path, found = recorded
    found["laurel"] = [3.0, 9.0, 2.0, 1.0, 4.0]
    assert command.main(["baseline", "--op", "laurel", "--file", str(path), "--write"]) == 0
    held = json.loads(path.read_text())["ratios"]
    assert held["laurel"]["ratios"] == {"effkern": 3.0}
    assert held["label_rank"]["ratios"] == {"effkern": 1.0}


def test_committed_baselines_are_of_the_cases_of_today():
    held = json.loads(baseline.PATH.read_text())["ratios"]
    assert set(held) == set(suite.SMALL)
    for name, entry in held.items():
        # The kernel is that of the machine.
        today = {**baseline.case_of(suite.load(name)), "kernel": entry["case"].get("kernel")}
        assert {"kernel": None, **entry["case"]} == today
        assert entry["ratios"]
        assert all(0 < ratio < 100 for ratio in entry["ratios"].values())


def fresh(arguments, cwd):
    # Without what pytest says to its own workers: pytest-benchmark would switch itself off.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("laurel --rounds=0", "--rounds must be at least 1 and --threads at least 0, got 0 and 2"),
        ("laurel --threads=-1", "--threads at least 0, got 9 and -1"),
        ("ceilings --threads 1 0", "--threads must be at least 1, got 0"),
        ("scaling --rounds 0", "--rounds and --threads must be at least 1, got 0 and 1"),
        ("scaling --threads 0", "--rounds and --threads must be at least 1, got 5 and 0"),
        ("scaling --json FOLDER", "--json must be a file that can be written, got FOLDER: it is a folder"),
        ("baseline --rounds 0", "--rounds must be at least 1, got 0"),
        ("baseline --write --file EMPTY", "--file must hold baselines or not exist, got EMPTY: Expecting value"),
        ("baseline --write --file LIST", "--file must hold baselines or not exist, got LIST: "),
        ("baseline --write --file FOLDER", "--file must hold baselines or not exist, got FOLDER: "),
    ],
)
def test_options_without_sense_are_refused_before_anything_is_measured(words, said, tmp_path, capsys, monkeypatch):
    def measures(*_):
        raise AssertionError("measured")

    for module in (ceilings, scaling):
        monkeypatch.setattr(module, "measure", measures)
    monkeypatch.setattr(baseline, "ratios", measures)
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "LIST").write_text("[]")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    name, *rest = words.split()
    act = (
        (lambda: command.main([name, *rest]))
        if name in command.COMMANDS
        else (lambda: harness.parse(suite.load(name), [*rest, "--device=cpu"]))
    )
    with pytest.raises(SystemExit) as stop:
        act()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "EMPTY").read_text() == ""


def test_ceilings_take_the_cores_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(ceilings.os, "cpu_count", lambda: 64)
    for allowed, counts in (({3}, [1]), ({0, 5}, [1, 2]), (set(range(8)), [1, 2, 8])):
        monkeypatch.setattr(ceilings.os, "sched_getaffinity", lambda _, allowed=allowed: allowed, raising=False)
        assert ceilings.thread_counts() == counts
    monkeypatch.delattr(ceilings.os, "sched_getaffinity")
    assert ceilings.thread_counts() == [1, 2, 64]


def test_pytest_runs_the_entries_of_one_op(tmp_path):
    path = tmp_path / "found.json"
    options = ["--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1", f"--benchmark-json={path}"]
    done = fresh(["-m", "pytest", "-q", "-p", "no:xdist", "benchmarks/", "-k", "batched_eigh", *options], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())["benchmarks"]
    assert {b["params"]["variant"] for b in found} == set(suite.load("batched_eigh").variants)
    work = suite.load("batched_eigh").work(found[0]["extra_info"]["case"])
    assert all(b["extra_info"]["flops"] == int(work.flops) and b["stats"]["rounds"] >= 1 for b in found)


def test_bench_takes_files_where_the_user_is(tmp_path):
    line = {"benchmark": "one", "case": {}, "wall": 1.0}
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({**line, "variant": v}) for v in ("effkern", "eager")))
    done = fresh(["-m", "effkern", "bench", "compare", "a.jsonl", "a.jsonl"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| one | device cpu | effkern | 1.00 | 1.00 | 1.00 |" in done.stdout
