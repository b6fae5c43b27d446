"""Links that leave the folder of the pages, so that one text serves a code host and the site.

Documents of the repository that are pages here are found by MAPPED; other files come as downloads; what is neither, a
folder for example, keeps its words and loses the link. A page may hold one of those documents: an `include` of a file
outside is replaced by its text, with links as seen from the page. Patterns of a toctree that fit no page are left out.
"""

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
MAPPED = {"benchmarks/RESULTS.md": "results.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
PATTERN = re.compile(r"^[\w/-]*\*[\w/-]*\n", flags=re.MULTILINE)
INCLUDE = re.compile(r"^```\{include\} (\.\./\S+)\n```$", flags=re.MULTILINE)


def linked(text: str, base: Path, page: Path) -> str:
    """`text`, whose links are relative to `base`, for the page in the folder `page`."""

    def replace(match: re.Match[str]) -> str:
        picture, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = Path(os.path.normpath(base / target))
        known = MAPPED.get(path.relative_to(ROOT).as_posix()) if path.is_relative_to(ROOT) else None
        if known:
            path = DOCS / known
        elif not path.is_relative_to(DOCS) and (path.suffix == ".md" or not path.is_file()):
            return words
        return f"{picture}[{words}]({os.path.relpath(path, page)}{anchor})"

    # Not within code.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 2 else LINK.sub(replace, part) for i, part in enumerate(parts))


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    page = (DOCS / docname).parent

    def include(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(page / match[1]))
        app.env.note_dependency(str(path))
        return linked(path.read_text(), path.parent, page)

    def pages(match: re.Match[str]) -> str:
        return match[0] if any(page.glob(f"{match[0].strip()}.md")) else ""

    source[0] = PATTERN.sub(pages, linked(INCLUDE.sub(include, source[0]), page, page))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "version": "1"}
