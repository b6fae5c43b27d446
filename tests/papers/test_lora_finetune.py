"""The experiment: equivalent starts are one start for LoRA-RITE and LoRA-Muon, and are not for AdamW."""

import json
from pathlib import Path

import pytest

from benchmarks.papers.lora_finetune import OPTIMIZERS, fit

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "lora_finetune.json"


@pytest.mark.parametrize("name", ["LoRA-RITE", "LoRA-Muon"])
def test_the_size_of_A_is_not_seen(name):
    losses = [fit(OPTIMIZERS[name], 0.03, 0, 40, scale) for scale in (1.0, 30.0, 1 / 30)]
    before = fit(OPTIMIZERS["AdamW"], 0.0, 0, 1, 1.0)
    assert losses[0] < 0.5 * before
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_adamw_sees_it():
    losses = [fit(OPTIMIZERS["AdamW"], 0.03, 0, 40, scale) for scale in (1.0, 30.0)]
    assert losses[1] > 2 * losses[0]


def test_committed_figures_are_of_this_experiment():
    """The table's own claims: no rate at the edge of its grid, LoRA-RITE no worse than AdamW at the usual start."""
    found = json.loads(RESULTS.read_text())["optimizers"]
    assert found.keys() == OPTIMIZERS.keys()
    assert not any(result["edge_of_grid"] for result in found.values())
    rite, adamw = found["LoRA-RITE"]["loss"], found["AdamW"]["loss"]
    assert rite["1"] <= adamw["1"]
    assert rite["30"] == pytest.approx(rite["1"], rel=0.02)
    assert adamw["30"] > 10 * adamw["1"]
