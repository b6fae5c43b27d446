"""README.md is true: its code blocks run, its commands parse, its figures name a command that exists."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_blocks_run(code, capsys):
    if "import transformers" in code:
        pytest.importorskip("transformers")
    exec(compile(code, "README.md", "exec"), {})
    loss = float(re.search(r"\d+\.\d+", capsys.readouterr().out).group())
    assert 1.0 < loss < 500.0


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"^make ([a-z-]+)", TEXT, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("effkern ")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_options_of_the_commands_exist(command, capsys):
    """Each command is asked for its help, which must know every option that README uses."""
    from effkern import cli

    words = [word for word in command[1:] if not word.startswith("-")]
    depth = 2 if words[0] in ("data", "runs") else 1
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(cli.main([*command[1 : 1 + depth], "--help"]))
    assert not stop.value.code
    text = capsys.readouterr().out
    for option in (word for word in command if word.startswith("--")):
        assert option in text, f"{' '.join(command)}: {option} is not in its help"
