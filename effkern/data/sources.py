"""What a source of text is, and how the name of one becomes one.

stdlib            stdlib-code and stdlib-docs
stdlib-code       the interpreter's own .py files, outside tests
stdlib-docs       their docstrings, and the language reference behind help()
hf:NAME           a data set of the optional `datasets` package (hf:NAME:CONFIG:SPLIT)
anything else     a file, a folder or a glob of .txt .py .md .jsonl .jsonl.gz .jsonl.zst
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from effkern.data.document import Document, Skipped


class Source(Protocol):
    """Texts under one name. The order of `read` is fixed; where possible its start is a fair sample of the whole."""

    name: str

    def read(self) -> Iterator[Document | Skipped]: ...


def resolve_sources(names: Sequence[str | Path], text_field: str = "text") -> list[Source]:
    """Turn names into sources, without reading their texts.

    Args:
        names: see the head of this module; a repeated source is given once.
        text_field: the field of a jsonl record or of a `datasets` row that holds the text.

    Raises:
        ValueError: no names, an unknown name, a path that does not exist, a glob that matches nothing.
        ImportError: hf:NAME without the `datasets` package.
    """
    if isinstance(names, str):
        raise TypeError(f"resolve_sources: sources must be a sequence of names, got the string {names!r}")
    sources: dict[str, Source] = {}
    for name in names:
        for source in _resolve(str(name), text_field):
            sources.setdefault(source.name, source)
    if not sources:
        raise ValueError("resolve_sources: sources must name at least one source, got none")
    return list(sources.values())


def _resolve(name: str, text_field: str) -> list[Source]:
    from effkern.data.files import FileSource
    from effkern.data.hub import HubSource
    from effkern.data.stdlib import StdlibCode, StdlibDocs

    if name == "stdlib":
        return [StdlibCode(), StdlibDocs()]
    if name == "stdlib-code":
        return [StdlibCode()]
    if name == "stdlib-docs":
        return [StdlibDocs()]
    if name.startswith("hf:"):
        return [HubSource(name, text_field)]
    return [FileSource(name, text_field)]
