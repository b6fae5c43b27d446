"""Result lines: JSON objects with benchmark, case and variant, one a line; other text between them says nothing."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
Record = dict[str, Any]


class Unusable(ValueError):
    """A file of result lines that cannot be used, and why."""


def record_of(line: str) -> Record | None:
    """What one line says; None: it is no result.

    Raises:
        ValueError: it begins as one and is none, or only half of one.
    """
    if not line.startswith('{"'):
        return None
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"a result line must be one JSON object, got {line[:60]!r}: {error}") from None
    if "variant" not in record:
        return None
    if not isinstance(record.get("benchmark"), str) or not isinstance(record.get("case"), dict):
        raise ValueError(f"a result line must have benchmark and case, got {line[:60]!r}")
    return record


def measured(text: str) -> list[Record]:
    """The results in the output of a command, which may have been cut off within one."""
    found = []
    for line in text.splitlines():
        try:
            record = record_of(line)
        except ValueError:
            continue
        if record is not None:
            found.append(record)
    return found


def records_of(lines: Iterable[str], name: str = "lines") -> Iterator[Record]:
    """Raises Unusable with `name` and the number of a line that is broken."""
    for number, line in enumerate(lines, 1):
        try:
            record = record_of(line)
        except ValueError as error:
            raise Unusable(f"{name}, line {number}: {error}") from None
        if record is not None:
            yield record


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise Unusable(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Unusable(f"cannot read {path}: {error}") from None


def of_files(paths: Sequence[Path]) -> list[Record]:
    """Raises Unusable: a file cannot be read, has a broken line, or none of them has a result."""
    found = [record for path in paths for record in records_of(text_of(path).splitlines(), str(path))]
    if not found:
        raise Unusable(f"{', '.join(map(str, paths))} must hold result lines, got none")
    return found


def committed(folder: Path = RESULTS) -> list[Record]:
    """All of benchmarks/results: result lines as they are, other commands' results by benchmarks/records.py."""
    from benchmarks import records

    found = list(records_of(records.lines(folder)))
    paths = sorted(path for path in folder.glob("*.jsonl") if path.name not in records.READERS)
    return [*found, *of_files(paths)] if paths else found


def given(paths: Sequence[Path]) -> list[Record]:
    """Of these files; without any, the committed ones."""
    return of_files(paths) if paths else committed()


def place(record: Record) -> Record:
    """The case, with the device: another GPU is another case."""
    case = {"device": "cpu", **record["case"]}
    return case if case["device"] == "cpu" else {**case, "gpu": record.get("gpu")}


def key(record: Record) -> str:
    """Two lines with the same one measured the same."""
    return json.dumps([record["benchmark"], place(record), record["variant"]], sort_keys=True)


def replaced(old: Sequence[str], new: Sequence[Record]) -> list[str]:
    """`old` without what was measured anew, and that behind it. Text that is no result stays."""
    latest = {key(record): record for record in new}
    records = [(line, record_of(line)) for line in old]
    stay = [line for line, record in records if record is None or key(record) not in latest]
    return [*stay, *map(json.dumps, latest.values())]
