"""`EFFKERN_PURE=1` installs without a compiler, and everything still works through the references."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RUN = """
import json, sys
# An editable install would lend its compiled modules to a package that has none.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, effkern
import effkern.data
from effkern import cli_doctor
from effkern.ops.token_stats import label_rank

torch.manual_seed(0)
hidden = torch.randn(300, 16, requires_grad=True)
weight = torch.randn(1000, 16, requires_grad=True)
teacher = effkern.TeacherHidden(torch.randn(300, 8), torch.randn(1000, 8))
labels = torch.randint(0, 1000, (300,))
loss = effkern.linear_distill_loss(
    hidden, weight, labels, teacher=teacher, omega=0.5, temperature=1.0, teacher_temperature=0.5, chunk_bytes=400000
).loss
loss.backward()
rank = label_rank((hidden @ weight.t()).detach(), labels).rank
uses = {op: device["cpu"]["uses"] for op, device in cli_doctor.report()["ops"].items()}
print(json.dumps([effkern.__file__, loss.item(), weight.grad.norm().item(), rank.sum().item(), uses]))
"""


def run(folder: Path) -> list:
    import json

    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_pure_install_gives_the_same_numbers(tmp_path):
    target = tmp_path / "site"
    source = tmp_path / "source"
    for path in [
        *ROOT.glob("effkern/**/*.py"),
        *(ROOT / f for f in ("setup.py", "pyproject.toml", "README.md", "LICENSE")),
    ]:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    environment = {**os.environ, "EFFKERN_PURE": "1", "CXX": "/bin/false", "CC": "/bin/false"}
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(source)], env=environment, check=True)
    assert not list(target.rglob("*.so"))

    pure, full = run(target), run(ROOT)
    assert pure[0].startswith(str(target))
    # The core of LoRA-RITE has its own plain form beside the reference, which computes pair by pair.
    assert {op: uses for op, uses in pure[4].items() if uses != "reference"} == {"lora_rite": "plain"}
    assert pure[1] == pytest.approx(full[1], rel=1e-6)
    assert pure[2] == pytest.approx(full[2], rel=1e-6)
    assert pure[3] == full[3]
