"""The command that prints the table of parity: its lines hold, and one that does not is seen."""

import pytest

pytest.importorskip("transformers")

from benchmarks import transformers_parity
from effkern.integrations.transformers import fused_loss, heads


def test_the_table_names_every_architecture_that_patch_knows():
    assert set(transformers_parity.OWN) == set(heads._FAMILIES)


def test_lines_of_the_table(monkeypatch, capsys):
    """Three architectures; the tests of patch have them all."""
    some = {name: transformers_parity.OWN[name] for name in ("Qwen3", "Gemma3n", "Cohere")}
    monkeypatch.setattr(transformers_parity, "OWN", some)
    assert transformers_parity.main([]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == [
        "loss",
        "loss, laurel",
        "loss, loop",
        "loss",
        "loss, laurel",
        "loss",
    ]
    assert all(line.endswith("| same bits | same bits | holds |") for line in lines)


def test_a_loss_that_is_off_fails(monkeypatch, capsys):
    monkeypatch.setattr(transformers_parity, "OWN", {"Phi": {}})
    call = fused_loss.Call.__call__
    monkeypatch.setattr(
        fused_loss.Call, "__call__", lambda self, hidden, weight, bias: call(self, hidden, weight, 2 * bias)
    )
    assert transformers_parity.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("FAILS |")
