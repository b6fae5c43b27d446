"""Every fault in a small form; `python -m tests.faults --trials 20` is the whole table (docs/reliability.md)."""

import json
from pathlib import Path

import pytest

from tests.faults.bench import Bench
from tests.faults.cases import CASES, run_case
from tests.faults.runs import small_config

# Cases in which nothing is to be reported: the run that is started again goes on.
SILENT = ("kill -9 of one rank", "kill -9 of all ranks")
# Of the cases in processes of their own those that share an undisturbed run; the command has all.
IN_PROCESSES = ("kill -9 of all ranks", "kill -9 under torchrun", "SIGTERM to one rank")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("faults")
    return Bench(folder, small_config(folder, 60), seed=1)


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*SILENT, *IN_PROCESSES)])
def test_nothing_is_lost(bench, name):
    found = run_case(name, bench, 2 if name != "data worker killed" else 1)
    assert found.exact == found.trials > 0
    assert found.detected == found.trials


@pytest.mark.parametrize("name", IN_PROCESSES)
def test_nothing_is_lost_by_signals(bench, name):
    found = run_case(name, bench, 1)
    assert found.exact == found.trials == 1
    assert name in SILENT or found.detected == 1


def test_the_recorded_table_is_whole():
    files = sorted((Path(__file__).parent / "results").glob("faults-*.json"))
    assert files
    cases = {row["case"]: row for row in json.loads(files[-1].read_text())["cases"]}
    assert cases.keys() == CASES.keys()
    assert all(row["exact"] == row["trials"] >= (20 if row["case"] in SILENT else 5) for row in cases.values())
    assert all(row["detected"] == row["trials"] for row in cases.values() if row["case"] not in SILENT)
