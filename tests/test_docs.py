"""The pages under docs are true: their code blocks run, in order, each page in a namespace of its own."""

import re
import shlex
from pathlib import Path

import pytest

import effkern

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
# Pages that say where things are or how the project works may hold no code; so may other documents shown as pages.
WITHOUT_CODE = ("adding-an-op.md", "architecture.md", "compatibility.md", "install.md", "reference.md")
OPS = sorted((DOCS / "ops").glob("*.md"))
DOCUMENTED = re.compile(r"^\.\. auto(?:function|class):: effkern\.(\S+)$", flags=re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def may_be_without_code(page: Path) -> bool:
    return page.name in WITHOUT_CODE or page.parent.name == "notes" or "```{include}" in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_run(page, monkeypatch):
    # As from a checkout: pages name committed files.
    monkeypatch.chdir(ROOT)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks or may_be_without_code(page)
    if any("import transformers" in code for code in blocks):
        pytest.importorskip("transformers")
    for code in blocks:
        exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))], ids=name_of
)
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

    text = (DOCS / "distillation-losses.md").read_text()
    first_cells = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    classes = [name for name in effkern.__all__ if name.startswith("Teacher")]
    assert sorted(first_cells) == sorted([*classes, *SPARSE_KINDS])


def test_every_public_name_is_documented_once():
    from effkern import nn, optim
    from effkern.integrations import transformers

    modules = ("nn", "optim", "distributed", "__version__")
    public = [name for name in effkern.__all__ if name not in modules]
    public += [f"nn.{name}" for name in nn.__all__] + [f"optim.{name}" for name in optim.__all__]
    public += [f"integrations.transformers.{name}" for name in transformers.__all__]
    found = [name for page in PAGES for name in DOCUMENTED.findall(page.read_text())]
    assert sorted(set(public) - set(found)) == []
    assert sorted(name for name in found if found.count(name) > 1) == []


@pytest.mark.parametrize("page", OPS, ids=name_of)
def test_a_page_of_an_op_has_all_its_parts(page):
    text = page.read_text()
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    parts = ["Formula", "What it saves", "Example", "Options", "Limits", "Source"]
    assert [heading for heading in headings if heading in parts] == parts
    assert "$$" in text.split("## What it saves")[0]
    assert re.findall(r"```\{measured\} (\w+)", text) == [page.stem]


def test_charts_of_the_committed_results(monkeypatch):
    """Charts have pages, their values are finite, and where there are bars this package has one."""
    monkeypatch.syspath_prepend(DOCS)
    import charts

    assert sorted(charts.CHARTS) == [page.stem for page in OPS]
    for op in charts.CHARTS:
        for chart in charts.charts(op):
            points = chart.values.values() if isinstance(chart, charts.Bars) else [y for _, y in chart.points]
            assert not isinstance(chart, charts.Bars) or chart.own
            assert all(0 < value < float("inf") for value in points), (op, chart)
    with pytest.raises(ValueError, match=r"op must be one of .*, got 'nothing'"):
        charts.charts("nothing")


def commands() -> list[tuple[str, str]]:
    """Every `effkern ..` line of the quick starts, with its page."""
    found = []
    for page in sorted(DOCS.glob("quickstart-*.md")):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines = [line.split("#")[0].strip() for line in block.splitlines()]
            found += [(page.name, line) for line in lines if line.startswith("effkern ")]
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda text: text)
def test_options_of_the_quick_starts_exist(page, line, capsys):
    """An op's benchmark parses its line; other commands are asked for their help, which must know every option."""
    from benchmarks import __main__ as benchmarks
    from benchmarks import harness, suite
    from effkern import cli

    words = shlex.split(line)[1:]
    if words[0] == "bench" and words[1] not in benchmarks.COMMANDS:
        assert harness.parser_of(suite.load(words[1])).parse_args(words[2:])
        return
    depth = 2 if words[0] in ("data", "runs") else 1
    # `effkern bench` starts the former as a process.
    main, command = (benchmarks.main, words[1:2]) if words[0] == "bench" else (cli.main, words[:depth])
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main([*command, "--help"]))
    assert not stop.value.code
    text = capsys.readouterr().out
    for option in (word for word in words if word.startswith("--")):
        assert option in text, f"{page}: {line}: {option} is not in its help"


def test_the_config_of_the_quick_start_is_one(tmp_path):
    from effkern.train.config import TrainConfig
    from effkern.train.mapping import overlay, read_toml

    text = (DOCS / "quickstart-trainer.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    path = tmp_path / "run.toml"
    path.write_text(block)
    config = overlay(TrainConfig(), read_toml(path))
    assert (config.schedule.mode, config.schedule.kd_steps) == ("salt", 800)


def test_docstrings_become_markup(monkeypatch):
    """Formulas keep their form, prose loses nothing to reStructuredText."""
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(DOCS)
    from docstrings import restructured

    text = (
        "Mean of |x| over `rows`s, see arXiv 2410.18779.\n\n"
        "loss = sum_n w_n L_n\nover rows that count: x_ and 2 * 3\n\n"
        "Args:\n    dim: D.\n\nMemory: O(N)."
    )
    found = restructured(text.splitlines())
    assert found[0] == (r"Mean of \|x\| over ``rows``\ s, see `arXiv 2410.18779 <https://arxiv.org/abs/2410.18779>`__.")
    assert found[2:7] == ["::", "", "    loss = sum_n w_n L_n", "", r"over rows that count: x\_ and 2 \* 3"]
    assert r"    dim: \D." in found
    assert "**Memory:** O(N)." in found


def test_links_out_of_the_pages(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(DOCS)
    from outside import linked

    code = "\n```\n[b](../examples)\n```\n"
    text = "[a](../benchmarks/RESULTS.md#x) [b](../examples) [c](../setup.py) [d](laurel.md)"
    assert linked(text + code, DOCS, DOCS) == "[a](results.md#x) b [c](../setup.py) [d](laurel.md)" + code
    assert linked("[a](results/suite.jsonl)", ROOT / "benchmarks", DOCS) == "[a](../benchmarks/results/suite.jsonl)"


def test_a_formula_is_set_or_refused(monkeypatch):
    pytest.importorskip("sphinx")
    pytest.importorskip("ziamath")
    monkeypatch.syspath_prepend(DOCS)
    from formulas import svg

    text = svg(r"\frac{a}{b}", True)
    assert 'aria-label="\\frac{a}{b}"' in text
    assert "currentColor" in text
    with pytest.raises(ValueError, match="a command is not known"):
        svg(r"\nosuch{a}", True)


def test_the_citation_file_is_whole():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == effkern.__version__
    assert cited["license"] == "Apache-2.0"
    for work in [cited, *cited["references"]]:
        assert work["title"]
        assert work["authors"]
    assert f"## [{effkern.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
