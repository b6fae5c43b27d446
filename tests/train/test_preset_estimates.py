"""benchmarks.preset_estimates: it measures the presets as they are, and one of them is as large as it is estimated."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import preset_estimates
from effkern.ops.distill.ceilings import Ceilings
from effkern.train.estimate_ranks import Cluster
from effkern.train.presets import PRESETS

MACHINE = Cluster(1, Ceilings("test", {4: 1e11}, 1e10, 1 << 34, is_cpu=True), 1, 1.0, 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_only_batch_and_place_are_changed(name):
    config, chosen = PRESETS[name].config, preset_estimates.scaled(name, 1, Path("work"))
    for section in ("model", "optimizer", "schedule", "distributed"):
        assert getattr(chosen, section) == getattr(config, section)
    assert (chosen.data.seq_len, chosen.data.batch_size) == (config.data.seq_len, 1)


def test_what_fits_decides_on_the_rows():
    def rows(name: str, gib: float, seconds: float = 1e9) -> int:
        return preset_estimates.rows_that_fit(name, MACHINE, gib * 2**30, seconds)

    assert rows("demo", 18) == PRESETS["demo"].config.data.batch_size
    assert (rows("small", 18), rows("small", 100), rows("paper-2.8b", 18)) == (1, 16, 0)
    assert rows("small", 100, 10.0) == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_a_preset_takes_the_memory_of_its_estimate(tmp_path, monkeypatch, capsys):
    """The bound is that of the committed table; another record in the file stays."""
    path = tmp_path / "found.json"
    path.write_text(json.dumps([{**dict.fromkeys(("estimated_bytes", "estimated_s", "parameters", "seq_len"), 1.0),
                                 "preset": "small", "rows": 0}]))  # fmt: skip
    monkeypatch.setattr(preset_estimates, "cpu", lambda threads: MACHINE)
    assert preset_estimates.main(["--only", "demo", "--steps", "2", "--threads", "1", "--json", str(path)]) == 0
    found = {r["preset"]: r for r in json.loads(path.read_text())}
    assert set(found) == {"small", "demo"}
    assert 0.75 < found["demo"]["measured_bytes"] / found["demo"]["estimated_bytes"] < 1.25
    assert found["demo"]["measured_s"] == found["demo"]["seconds"][1] > 0
    printed = capsys.readouterr().out
    assert "| small | 0.0M | 1 x 1.0 | does not fit |" in printed
    assert f"| demo | {found['demo']['parameters'] / 1e6:.1f}M | 8 x 128 | " in printed


def test_refusals(capsys):
    for words, message in (
        (["--steps", "1"], "--steps must be at least 2, got 1"),
        (["--only", "huge"], "invalid choice: 'huge'"),
    ):
        with pytest.raises(SystemExit):
            preset_estimates.main(words)
        assert message in capsys.readouterr().err
    assert torch.get_num_threads() >= 1
