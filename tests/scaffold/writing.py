"""From template/ to the files of one op."""

import keyword
import os
import re
import subprocess
import sys
from pathlib import Path

TEMPLATE = Path(__file__).parent / "template"
PLACEHOLDER = "op_name"
EXPORTS, SUITE = Path("effkern/__init__.py"), Path("benchmarks/suite.py")
# What the suite runs of a new op: short, whole, and one small case.
RUNS = {"QUICK": '["--rounds=3"]', "FULL": '["", "--dims=768 --memory --rounds=3"]'}
SMALL = '"--rows=512 --dims=768 --dtypes=float32 --pass=both"'


class Refusal(Exception):
    """Why nothing was written."""


def scaffold(name: str, root: Path) -> list[Path]:
    """Write the op and return its paths, relative to `root`; all of it or, with a Refusal, nothing.

    Raises:
        Refusal: the name is none, is taken, or a file is in the way or has changes that are not committed.
    """
    _check_name(name)
    for path in (EXPORTS, SUITE, Path("pyproject.toml")):
        if not (root / path).is_file():
            raise Refusal(f"--root must be the repository, got {root} without {path}")
    new = {_renamed(path, name): path.read_text().replace(PLACEHOLDER, name) for path in _template_files()}
    _check_free(name, root, list(new))
    _check_clean(root)
    changed = {EXPORTS: _exported(root / EXPORTS, name), SUITE: _listed(root / SUITE, name)}
    before = {path: (root / path).read_text() for path in changed}
    try:
        for path, text in {**new, **changed}.items():
            _write(root / path, text)
        _tidy(root, [path for path in (*new, *changed) if path.suffix == ".py"])
    except BaseException:
        for path in new:
            (root / path).unlink(missing_ok=True)
        folder = root / "effkern" / "ops" / name
        if folder.is_dir():
            folder.rmdir()
        for path, text in before.items():
            _write(root / path, text)
        raise
    return [*new, *changed]


def _template_files() -> list[Path]:
    return sorted(path for path in TEMPLATE.rglob(f"*{PLACEHOLDER}*") if path.is_file()) + sorted(
        (TEMPLATE / "effkern" / "ops" / PLACEHOLDER).glob("*.py")
    )


def _renamed(path: Path, name: str) -> Path:
    return Path(str(path.relative_to(TEMPLATE)).replace(PLACEHOLDER, name))


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise Refusal(f"NAME must be lower-case words joined by underscores, and no keyword, got {name!r}")
    if len(name) > 40 or name == PLACEHOLDER:
        raise Refusal(f"NAME must have at most 40 letters and not be the placeholder {PLACEHOLDER!r}, got {name!r}")


def _check_free(name: str, root: Path, new: list[Path]) -> None:
    """Neither a file nor a module nor an exported name nor an operator of this name."""
    taken = [root / "effkern" / "ops" / name, root / "effkern" / name, root / "effkern" / f"{name}.py"]
    for path in [*taken, *(root / path for path in new)]:
        if path.exists():
            raise Refusal(f"NAME must be free, got {name!r}: {path.relative_to(root)} exists")
    if f'"{name}"' in (root / EXPORTS).read_text():
        raise Refusal(f"NAME must be free, got {name!r}: effkern exports it")


def _check_clean(root: Path) -> None:
    """That git, where there is one, holds the two files that are changed as they stand."""
    command = ["git", "-C", str(root), "status", "--porcelain", "--", str(EXPORTS), str(SUITE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return
    if done.returncode == 0 and done.stdout.strip():
        names = ", ".join(line[3:] for line in done.stdout.splitlines())
        raise Refusal(f"files that are changed must have no changes that are not committed, got {names}")


def _exported(path: Path, name: str) -> str:
    """One line of re-export, and the name in __all__; ruff sorts both."""
    text = path.read_text()
    last = [*re.finditer(r"^from effkern\.ops\..*\n", text, flags=re.MULTILINE)]
    if not last or "__all__ = [\n" not in text:
        raise Refusal(f"{EXPORTS} must export ops and have an __all__, got neither or one")
    at = last[-1].end()
    text = text[:at] + f"from effkern.ops.{name} import {name}\n" + text[at:]
    return text.replace("__all__ = [\n", f'__all__ = [\n    "{name}",\n', 1)


def _listed(path: Path, name: str) -> str:
    """The op in the three tables of the suite, each by the alphabet."""
    lines = path.read_text().splitlines(keepends=True)
    for table, value in {**RUNS, "SMALL": SMALL}.items():
        try:
            first = lines.index(f"{table} = {{\n") + 1
        except ValueError:
            raise Refusal(f"{SUITE} must have the table {table}, got none") from None
        at = first
        while lines[at] != "}\n" and lines[at].strip().split('"')[1] < name:
            at += 1
        lines.insert(at, f'    "{name}": {value},\n')
    return "".join(lines)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _tidy(root: Path, paths: list[Path]) -> None:
    """Lines as long as the name makes them, and imports and __all__ in their order."""
    names = [str(path) for path in paths]
    for command in (["check", "--quiet", "--select", "I,RUF022", "--fix", *names], ["format", "--quiet", *names]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], cwd=root, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Refusal(f"ruff must be there and accept the files (make install), got {done.stdout + done.stderr}")
