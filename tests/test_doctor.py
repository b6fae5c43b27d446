"""`effkern doctor` says what is there, and says why where something is not."""

import json

import torch

from effkern import cli_doctor, native


def test_json_names_every_op_and_its_implementation(capsys):
    assert cli_doctor.main(as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert {"linear_distill_loss", "label_rank"} <= set(found["ops"])
    expected = "reference" if native.load("_C") else "cpp"
    for op in ("linear_distill_loss", "label_rank"):
        if not native.triton_interprets() or expected == "cpp":
            assert found["ops"][op]["cpu"]["uses"] == expected


def test_table_explains_a_missing_module(monkeypatch, capsys):
    monkeypatch.setattr(native, "load", lambda module: f"effkern.{module} was not built")
    monkeypatch.setattr(native, "triton_interprets", lambda: False)
    cli_doctor.main(as_json=False)
    out = capsys.readouterr().out
    assert "linear_distill_loss on cpu: reference" in out
    assert "not cpp: effkern._C was not built" in out
    assert "not triton: Triton kernels need a CUDA tensor" in out
