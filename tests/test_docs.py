"""The pages under docs are true: their code blocks run, in order, each page in a namespace of its own."""

import re
from pathlib import Path

import pytest

import effkern

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    for code in blocks:
        exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Relative links, and the modules of the repository that a page says to run."""
    text = page.read_text()
    for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"python -m ((?:benchmarks|effkern)[\w.]*\w)", text):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_the_page_of_losses_names_every_teacher_and_kind_once():
    from effkern.ops.distill.rows import SPARSE_KINDS

    text = (ROOT / "docs" / "distillation-losses.md").read_text()
    first_cells = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    classes = [name for name in effkern.__all__ if name.startswith("Teacher")]
    assert sorted(first_cells) == sorted([*classes, *SPARSE_KINDS])
