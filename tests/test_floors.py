"""The floors of the house: imports point downwards only, and the ops need torch alone."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lint(cwd: Path) -> subprocess.CompletedProcess[str]:
    """import-linter over the contracts in pyproject.toml."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_imports_point_downwards():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_an_upward_import_is_caught(tmp_path):
    """A copy of the package in which an op imports the trainer."""
    for path in [*(ROOT / "effkern").rglob("*.py"), ROOT / "pyproject.toml"]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    bad = tmp_path / "effkern" / "ops" / "distill" / "gemm.py"
    bad.write_text(bad.read_text() + "\nimport effkern.train\n")
    done = lint(tmp_path)
    assert done.returncode != 0
    assert "effkern.ops is not allowed to import effkern.train" in done.stdout


def test_import_needs_torch_alone():
    """`import effkern` with every optional package hidden."""
    hidden = ("numpy", "triton", "tokenizers", "safetensors", "tyro", "rich", "matplotlib", "tensorboard")
    hidden += ("transformers",)
    code = f"""
import sys
for name in {hidden!r}:
    sys.modules[name] = None
import effkern, torch
import effkern.integrations.transformers
x = torch.randn(3, 4, requires_grad=True)
effkern.linear_distill_loss(x, torch.randn(5, 4), torch.arange(3)).loss.backward()
assert x.grad.norm() > 0
assert not any(m.startswith(("effkern.train", "effkern.data", "effkern.models")) for m in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
