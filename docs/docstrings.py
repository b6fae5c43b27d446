"""The package's docstrings, plain text with formulas, as reStructuredText for autodoc; napoleon reads the sections.

Formulas and aligned text stay as they were written, in blocks of code; `name` becomes code; what reStructuredText would
take for markup is escaped; arXiv numbers become links; and paragraphs that begin as "Memory: .." get that word in bold.
"""

import re
from typing import Any

from sphinx.application import Sphinx

SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")
# Starts of lines that state something: loss = .., L <- .., mean_G R_G = ..
STATEMENT = re.compile(r"[\w~^{}'()\[\]|+\-*/,.;: ]{1,44}? (=|<-) \S")
# What begins as a sentence, has two words in a row before the sign, or a sentence behind it: no formula.
PROSE = re.compile(
    r"(With|The|A|An|Of|In|At|It|As|For|To|If|Where|Every|Without|Mean|Frozen|Sum)\b"
    r"|[^=<]*[A-Za-z]{3,} [a-z]{3,}[^=<]*(=|<-)"
    r"|.*\. [A-Z][a-z]+ [a-z]+ [a-z]"
)
ALIGNED = re.compile(r"\S {2,}\S")
LEAD = re.compile(r"^([A-Z][a-z]+(?: [a-z]+){0,5}): (?=\S)")
# Begin a paragraph wherever they stand.
KEYWORD = re.compile(r"(Source|Memory|Communication|Range|State|Failures)\b[^:.]{0,40}: ")
ARXIV = re.compile(r"\barXiv:? ?(\d{4}\.\d{4,5})")
INDENT = "    "
FIELDS = ("attribute", "property", "data")
# Stands for a colon while napoleon reads a field's text.
COLON = "\x91"


def inline(text: str) -> str:
    """One line of prose."""
    found = []
    for i, part in enumerate(text.split("`")):
        if i % 2:
            found.append(f"``{part}``")
            continue
        part = re.sub(r"([\\*|])", r"\\\1", part)
        # A name that ends in an underscore would be a reference, a letter with a point an item of a list.
        part = re.sub(r"(\w)_(?!\w)", r"\1\\_", part)
        part = re.sub(r"((?:^|: ) *)([A-Za-z]\.)(?=\s|$)", r"\1\\\2", part)
        # Code must not touch a letter.
        found.append("\\ " * (i > 0 and part[:1].isalnum()))
        found.append(ARXIV.sub(r"`arXiv \1 <https://arxiv.org/abs/\1>`__", part))
    return "".join(found)


def literal(line: str) -> bool:
    """Whether a line of a paragraph keeps its form."""
    return apart(line) or (bool(STATEMENT.match(line)) and not PROSE.match(line))


def apart(line: str) -> bool:
    """Set apart by spaces: indented, or in columns."""
    return line.startswith(" ") or bool(ALIGNED.search(line))


def table(lines: list[str]) -> list[str]:
    """A table of Markdown, its second line the rule below the head."""
    found = [".. list-table::", "   :header-rows: 1", ""]
    for row in (lines[0], *lines[2:]):
        for i, cell in enumerate(row.strip("| ").split("|")):
            found.append(f"   {'  ' if i else '* '}- {inline(cell.strip())}")
    return found


def paragraph(lines: list[str]) -> list[str]:
    """A paragraph outside of the sections: runs of prose and of formulas."""
    if lines[0].startswith(("- ", "1. ")):
        return [inline(line) for line in lines]
    if all(line.startswith("|") for line in lines):
        return table(lines)
    marks = [literal(line) for line in lines]
    if not marks[0]:
        # Behind prose only what is set apart is a formula: a sentence may well have a sign in it.
        marks = [apart(line) for line in lines]
    for i, line in enumerate(lines[:-1]):
        # What ends within a sentence goes with the prose behind it.
        marks[i] = marks[i] and (marks[i + 1] or not line.endswith(","))
    found: list[str] = []
    for i, line in enumerate(lines):
        begins = i == 0 or marks[i] != marks[i - 1] or bool(KEYWORD.match(line))
        if begins and i:
            found.append("")
        if marks[i]:
            found += ["::", "", INDENT + line] if begins else [INDENT + line]
        elif begins and (lead := LEAD.match(line)):
            found.append(f"**{lead[1]}:** {inline(line[lead.end() :])}")
        else:
            found.append(inline(line))
    return found


def restructured(lines: list[str]) -> list[str]:
    """A whole docstring."""
    found: list[str] = []
    block: list[str] = []
    section = False
    for line in [*lines, ""]:
        if SECTION.match(line):
            found.append(line)
            section = True
        elif section and (not line or line.startswith(" ")):
            found.append(inline(line))
        elif line:
            section = False
            block.append(line)
        elif block:
            found += [*paragraph(block), ""]
            block = []
    return found


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what not in FIELDS:
        lines[:] = restructured(lines)


def process_field(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Of a field there is one sentence, whose words before a colon napoleon would take for a type."""
    if what in FIELDS:
        raw = [line.replace(":", COLON) for line in lines if not line.startswith("Alias for field number")]
        lines[:] = [inline(line) for line in raw]


def colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    # Before and after napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-process-docstring", process_field, priority=400)
    app.connect("autodoc-process-docstring", colons, priority=600)
    return {"parallel_read_safe": True, "version": "1"}
