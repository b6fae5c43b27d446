"""The text that is on every machine with Python: the standard library's code, its docstrings, the reference."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from effkern.data.document import Document, Skipped, content_key
from effkern.data.files import read_text, sampled_order

# Tests hold generated tables and broken files on purpose; the others are not the library or differ by machine.
LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# The language reference as one dictionary: it comes as prose through `StdlibDocs`.
TOPICS = "pydoc_data/topics.py"


def stdlib_files() -> list[tuple[str, Path]]:
    """(relative name, path) of the library's .py files, without tests and files written for this one machine."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        machine = relative.name.startswith(("_sysconfigdata", "sitecustomize")) or relative.parts[0].startswith(
            "config-"
        )
        if not machine and LEFT_OUT.isdisjoint(relative.parts) and relative.as_posix() != TOPICS:
            found.append((relative.as_posix(), path))
    if not found:
        raise ValueError(f"sources: stdlib needs the .py files of the interpreter, got none below {root}")
    return sorted(found, key=lambda item: sampled_order(item[0]))


class StdlibCode:
    """One document per .py file."""

    name = "stdlib-code"

    def read(self) -> Iterator[Document | Skipped]:
        for label, path in stdlib_files():
            yield read_text(label, path)


class StdlibDocs:
    """One document per .py file: its docstrings, each under its dotted name; one per topic of help()."""

    name = "stdlib-docs"

    def read(self) -> Iterator[Document | Skipped]:
        yield from _topics()
        for label, path in stdlib_files():
            source = read_text(label, path)
            if isinstance(source, Skipped):
                yield source
                continue
            try:
                text = docstrings(source.text, _module_name(label))
            except (SyntaxError, ValueError, RecursionError) as error:
                yield Skipped(label, f"does not parse: {type(error).__name__}")
                continue
            if text:
                # The file's own key keeps its docstrings on the side of the split where its code is.
                yield Document(label, text, origin=content_key(source.text.encode()))


def docstrings(source: str, module: str) -> str:
    """All docstrings of a module in reading order, each below its dotted name."""
    with warnings.catch_warnings():
        # Old escapes in the library's own files are no business of the user.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    return "\n\n\n".join(f"{name}\n\n{text}" for name, text in _walk(tree, module))


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _walk(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt):
            yield from _walk(child, name)


def _topics() -> Iterator[Document | Skipped]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        yield Skipped(TOPICS, "unreadable: not installed")
        return
    for topic in sorted(topics, key=sampled_order):
        yield Document(f"{TOPICS}:{topic}", topics[topic])


def _module_name(label: str) -> str:
    parts = label.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
