"""Proposals for launch tables: the search finds what is faster, refuses what is wrong, and leaves the tables alone."""

import json
import sys
import time
import types
from typing import NamedTuple

import pytest
import torch

from benchmarks import tune
from benchmarks.tune import Row


class Launch(NamedTuple):
    limit: int
    block: int
    warps: int


@pytest.fixture
def table(monkeypatch):
    module = types.ModuleType("a_module_with_a_table")
    module.TABLE = [Launch(8, 64, 4), Launch(64, 64, 4)]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.TABLE


def row(table, act, **more) -> Row:
    def make(device: str):
        def run():
            launch = next(launch for launch in table if launch.limit >= 32)
            return [torch.full((2,), act(launch))]

        return run

    return Row("a_module_with_a_table", "TABLE", 1, {"block": (16, 512), "warps": (1, 8)}, make, **more)


def modelled(monkeypatch, cost) -> None:
    """Times that a model of the launch gives."""
    monkeypatch.setattr(tune, "seconds", lambda row, run, first, second: (cost(first), cost(second)))


def test_the_search_walks_to_the_fastest_and_puts_the_table_back(table, monkeypatch):
    modelled(monkeypatch, lambda launch: 1.0 + abs(launch.block - 256) / 64 + abs(launch.warps - 2))
    found = tune.tune(row(table, lambda launch: 0.0 * launch.block), "cpu", time.monotonic() + 60)
    assert found.present == {"limit": 64, "block": 64, "warps": 4}
    assert found.proposed == {"limit": 64, "block": 256, "warps": 2}
    assert found.proposed_ms < found.present_ms
    assert found.table == "a_module_with_a_table.TABLE[1]"
    assert table == [Launch(8, 64, 4), Launch(64, 64, 4)]


def test_small_gains_and_an_early_end_leave_the_present_row(table, monkeypatch):
    modelled(monkeypatch, lambda launch: 1.0 - launch.block / 1e5)
    given = row(table, lambda launch: 0.0 * launch.block)
    assert tune.tune(given, "cpu", time.monotonic() + 60).proposed["block"] == 64
    modelled(monkeypatch, lambda launch: 1.0 / launch.block)
    assert tune.tune(given, "cpu", time.monotonic() - 1).tried == 0


def test_wrong_results_and_rows_that_nothing_reads_are_errors(table, monkeypatch):
    modelled(monkeypatch, lambda launch: 1.0)
    with pytest.raises(RuntimeError, match="gives another result, relative error 1"):
        tune.tune(row(table, lambda launch: float(launch.block)), "cpu", time.monotonic() + 60)
    assert table[1] == Launch(64, 64, 4)
    with pytest.raises(RuntimeError, match="nothing reads row 1"):
        tune.tune(row(table, lambda launch: 1.0), "cpu", time.monotonic() + 60)


def test_what_does_not_compile_is_skipped(table, monkeypatch, capsys):
    def act(launch) -> float:
        if launch.block > 64:
            raise ValueError("out of resources")
        return 0.0

    modelled(monkeypatch, lambda launch: 1.0 / launch.block)
    assert tune.tune(row(table, act), "cpu", time.monotonic() + 60).proposed["block"] == 64
    assert "skipped: ValueError" in capsys.readouterr().err


def test_times_are_taken_in_turn_with_each_launch_in_place(table):
    seen = []
    given = row(table, lambda launch: seen.append(launch.warps) or 0.0)
    tune.seconds(given, given.make("cpu"), Launch(64, 64, 1), Launch(64, 64, 8))
    assert seen[:4] == [1, 8, 1, 8]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device exercises the rows themselves")
def test_every_row_of_the_real_tables_is_read_by_what_exercises_it():
    pytest.importorskip("triton")
    rows = tune.rows_of_tables()
    assert {r.module.split(".")[2] for r in rows} == {"distill", "laurel", "loop_step", "shampoo"}
    for r in rows:
        before = r.get()
        assert tune.exercised(r, r.make("cpu")), (r.table, r.key)
        assert r.get() is before
        for launch in tune.neighbours(before, r.fields):
            changed = [name for name in before._fields if getattr(before, name) != getattr(launch, name)]
            assert len(changed) == 1
            least, most = r.fields[changed[0]]
            assert least <= getattr(launch, changed[0]) <= most


def test_proposals_are_written_and_no_device_is_an_error(tmp_path, capsys, monkeypatch):
    p = tune.Proposal("t", {"warps": 4}, {"warps": 8}, 2.0, 1.0, 3)
    tune.write(tmp_path / "p.json", "a GPU", [p], {"u": "why"})
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["device"] == "a GPU"
    assert found["proposals"][0]["proposed"] == {"warps": 8}
    assert found["failed"] == {"u": "why"}
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    assert tune.main(["--json", str(tmp_path / "q.json")]) == 2
    assert "must have a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "q.json").exists()
    with pytest.raises(SystemExit):
        tune.main(["--seconds", "0"])
    assert "--seconds must be positive, got 0" in capsys.readouterr().err
