"""Sources: what each gives, what it skips and why, and how names become sources."""

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import zstandard

from effkern.data import Document, Skipped, resolve_sources
from effkern.data.document import content_key
from effkern.data.stdlib import docstrings


def read(*names: str | Path, text_field: str = "text") -> list[Document | Skipped]:
    return [item for source in resolve_sources(names, text_field) for item in source.read()]


def by_name(items: list[Document | Skipped]) -> dict[str, str]:
    return {item.name: item.text if isinstance(item, Document) else f"SKIPPED {item.reason}" for item in items}


def test_folder_takes_supported_files_below_it(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c/d/e.py", "c/image.png", ".hidden.txt", ".git/x.txt", "__pycache__/y.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() + b"\r\n")
    assert by_name(read(tmp_path)) == {name: f"{name}\r\n" for name in ("a.txt", "b.md", "c/d/e.py")}


def test_glob_and_single_file(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c/d.txt", "c/e.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert by_name(read(tmp_path / "**" / "*.txt")) == {"a.txt": "a.txt", "c/d.txt": "c/d.txt"}
    assert by_name(read(tmp_path / "c" / "*")) == {"d.txt": "c/d.txt", "e.bin": "SKIPPED unsupported suffix: .bin"}
    assert by_name(read(tmp_path / "b.md")) == {"b.md": "b.md"}


def test_labels_and_order_do_not_depend_on_the_place(tmp_path: Path) -> None:
    for root in ("one", "two/three"):
        for number in range(20):
            (tmp_path / root).mkdir(parents=True, exist_ok=True)
            (tmp_path / root / f"{number}.txt").write_text(str(number))
    assert read(tmp_path / "one") == read(tmp_path / "two/three") == read(tmp_path / "one" / "*.txt")
    # Scattered, so that a limit on bytes takes a sample and not the head of the alphabet.
    assert [item.name for item in read(tmp_path / "one")] != sorted(f"{number}.txt" for number in range(20))


def test_unreadable_and_foreign_encodings_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert by_name(read(tmp_path)) == {
        "good.txt": "marked",
        "latin.txt": "SKIPPED not UTF-8: byte 3",
        "gone.txt": "SKIPPED unreadable: No such file or directory",
    }


RECORDS = [{"text": "one \u00e9", "n": 1}, {"text": "two\nlines"}, {"text": "\u4e2d"}]
LINES = [json.dumps(record).encode() + b"\n" for record in RECORDS]


def write_jsonl(path: Path) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(b"".join(LINES)))
    elif path.suffix == ".zst":
        # A frame per line, as parallel writers make them.
        path.write_bytes(b"".join(zstandard.compress(line) for line in LINES))
    else:
        path.write_bytes(LINES[0] + b"\n" + LINES[1] + LINES[2].rstrip())


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_records_are_documents(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    write_jsonl(path)
    items = read(path)
    assert [item.text for item in items if isinstance(item, Document)] == [record["text"] for record in RECORDS]
    assert items[0].name == f"data{suffix}:1"


def test_jsonl_other_text_field(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"content": "x"}\n')
    assert by_name(read(path, text_field="content")) == {"data.jsonl:1": "x"}
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value) == f"{path}, line 1: must have a text field 'text', got ['content']"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_line_that_does_not_parse_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    content = LINES[0] + b'{"text": "cut sh\n' + LINES[1]
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content))
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 2: not valid JSON (")


@pytest.mark.parametrize(("line", "got"), [("[1]", "list"), ('{"text": 3}', r"\['text'\]"), ("7", "int")])
def test_jsonl_line_without_text(tmp_path: Path, line: str, got: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"data.jsonl, line 2: must have a text field 'text', got {got}$"):
        read(path)


def test_jsonl_lines_of_another_encoding_and_broken_archives(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES[0] + b'{"text": "caf\xe9"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(LINES))[:-6])
    (tmp_path / "c.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "d.jsonl.zst").write_bytes(b"not zstd")
    found = by_name(read(tmp_path))
    assert found["a.jsonl:2"] == "SKIPPED not UTF-8"
    assert found["b.jsonl.gz"].startswith("SKIPPED unreadable: Compressed file ended")
    assert found["c.jsonl.gz"].startswith("SKIPPED unreadable: Not a gzipped file")
    assert found["d.jsonl.zst"].startswith("SKIPPED unreadable: broken zstd stream")


def test_unknown_names(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    for name, message in [
        ("no-such", "got 'no-such'"),
        (tmp_path / "*.txt", "must hold files that end in .txt .py .md .jsonl .jsonl.gz .jsonl.zst, got none"),
        (tmp_path, "must hold files that end in"),
        (tmp_path / "x.bin", "a file must end in one of"),
        ("hf:", "must read hf:NAME"),
    ]:
        with pytest.raises(ValueError) as error:
            resolve_sources([name])
        assert message in str(error.value)
    with pytest.raises(ValueError, match="must name at least one source"):
        resolve_sources([])
    with pytest.raises(TypeError, match="must be a sequence of names, got the string 'stdlib'"):
        resolve_sources("stdlib")


def test_repeated_sources_are_read_once() -> None:
    names = [source.name for source in resolve_sources(["stdlib", "stdlib-docs", "stdlib-code"])]
    assert names == ["stdlib-code", "stdlib-docs"]


def test_datasets_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, object]]:
        asked.append((name, config, split, streaming))
        return [{"body": "one"}, {"body": None}, {"body": "two"}]

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert by_name(read("hf:owner/name", text_field="body")) == {
        "row 0": "one",
        "row 1": "SKIPPED empty",
        "row 2": "two",
    }
    read("hf:owner/name:cfg:test", text_field="body")
    assert asked == [("owner/name", None, "train", True), ("owner/name", "cfg", "test", True)]
    with pytest.raises(ValueError, match=r"hf:owner/name, row 0: must have a text field 'text', got \['body'\]"):
        read("hf:owner/name")


def test_datasets_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r'hf:x needs the optional package datasets: pip install "effkern\[datasets\]"'
    ):
        resolve_sources(["hf:x"])


def test_docstrings_under_dotted_names() -> None:
    source = '''"""Module."""
if 1:
    class A:
        """Class.

        More."""
        async def f(self):
            "Method."
            def bare(): "Inner."
    x = lambda: "no docstring"
'''
    assert docstrings(source, "pkg.m") == "\n\n\n".join(
        ["pkg.m\n\nModule.", "pkg.m.A\n\nClass.\n\nMore.", "pkg.m.A.f\n\nMethod.", "pkg.m.A.f.bare\n\nInner."]
    )


def test_stdlib_holds_code_and_prose_without_tests() -> None:
    code = {item.name: item for item in read("stdlib-code") if isinstance(item, Document)}
    assert "def dumps(" in code["json/__init__.py"].text
    assert sum(len(item.text) for item in code.values()) > 5_000_000
    for name in code:
        assert not {"test", "tests", "site-packages"} & set(name.split("/"))
        assert not name.startswith("_sysconfigdata")
    assert "pydoc_data/topics.py" not in code

    from effkern.data.stdlib import StdlibDocs

    docs = StdlibDocs().read()
    topics = []
    for item in docs:
        assert isinstance(item, Document)
        if not item.name.startswith("pydoc_data/topics.py:"):
            break
        topics.append(item)
    assert len(topics) > 50
    # A file's docstrings carry the key of its code, so that both fall on one side of the split.
    assert item.origin == content_key(code[item.name].text.encode())
