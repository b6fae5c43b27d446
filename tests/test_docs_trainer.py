"""The commands of docs/trainer.md run, in order, in a fresh folder, on the config that the page gives."""

import re
import shlex
from pathlib import Path

import pytest

from effkern import cli

for _name in ("numpy", "tokenizers", "safetensors", "tyro", "rich", "matplotlib", "tensorboard"):
    pytest.importorskip(_name)

TEXT = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text()


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = 0
    for language, block in re.findall(r"```(bash|toml)\n(.*?)```", TEXT, flags=re.DOTALL):
        if language == "toml":
            name = re.match(r"# (\S+)\n", block).group(1)
            (tmp_path / name).write_text(block)
            continue
        for line in block.splitlines():
            words = shlex.split(line)
            assert words[0] == "effkern"
            assert cli.main(words[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
            ran += 1
    assert ran == 11
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run.toml", "runs", "runs.svg", "exported"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"plain", "shampoo", "ablation"}
    assert "| laurel+shampoo |" in (tmp_path / "runs" / "ablation" / "ablation.md").read_text()


def test_the_page_names_every_preset():
    from effkern.train.presets import PRESETS

    table = TEXT.split("| preset |")[1]
    assert set(re.findall(r"`([a-z0-9.-]+)`", "".join(re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)))) == set(
        PRESETS
    )
