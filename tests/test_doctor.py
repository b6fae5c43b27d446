"""`effkern doctor` says what is there, and says why where something is not."""

import json

import torch

import effkern
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


def test_a_module_that_cannot_load_is_missing_for_a_reason(tmp_path, monkeypatch):
    """One of another Python, one of a system or a torch that is not this one, one that is not there at all."""
    monkeypatch.setattr(effkern, "__path__", [*effkern.__path__, str(tmp_path)])
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    (tmp_path / "_elsewhere.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    (tmp_path / "_broken.abi3.so").write_bytes(b"no library")
    said = "effkern._elsewhere was not built for this Python, only as _elsewhere.cpython-39-x86_64-linux-gnu.so"
    assert native.load("_elsewhere") == said
    assert str(native.load("_broken")).startswith(f"effkern._broken does not load: {tmp_path / '_broken.abi3.so'}: ")
    assert native.load("_nowhere") == "effkern._nowhere was not built"
