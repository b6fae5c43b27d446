"""Files, folders and globs of .txt .py .md and of .jsonl, plain or compressed."""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from effkern.data.document import Document, Skipped

TEXT_SUFFIXES = (".txt", ".py", ".md")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES


def sampled_order(label: str) -> bytes:
    """Sort key that scatters file names, so that the first files of a folder are a fair sample of it."""
    return blake2b(label.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def read_text(label: str, path: Path) -> Document | Skipped:
    """One whole file as one document; a byte-order mark at its start is dropped."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Skipped(label, f"not UTF-8: byte {error.start}")
    except OSError as error:
        return Skipped(label, f"unreadable: {error.strerror or error}")
    return Document(label, text)


class FileSource:
    """A file, every supported file below a folder (hidden ones left out), or those a glob matches (`**` recurses).

    A text file is one document, a jsonl record is one document. Files that cannot be read or are not UTF-8 are
    skipped; a jsonl line that does not parse, or that lacks the text field, is a ValueError.
    """

    def __init__(self, name: str, text_field: str = "text") -> None:
        self.name = name
        self.text_field = text_field
        self.files = sorted(_find(name), key=lambda item: sampled_order(item[0]))
        if not self.files:
            raise ValueError(f"sources: {name!r} must hold files that end in {' '.join(SUFFIXES)}, got none")

    def read(self) -> Iterator[Document | Skipped]:
        for label, path in self.files:
            if label.endswith(JSONL_SUFFIXES):
                yield from self._records(label, path)
            elif label.endswith(TEXT_SUFFIXES):
                yield read_text(label, path)
            else:
                yield Skipped(label, f"unsupported suffix: {path.suffix or 'none'}")

    def _records(self, label: str, path: Path) -> Iterator[Document | Skipped]:
        number = 0
        try:
            with open_lines(path) as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield self._record(f"{label}:{number}", path, number, line)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            yield Skipped(label, f"unreadable: {reason}" + (f" (after line {number})" if number else ""))

    def _record(self, label: str, path: Path, number: int, line: bytes) -> Document | Skipped:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return Skipped(label, "not UTF-8")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        text = record.get(self.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fields = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{path}, line {number}: must have a text field {self.text_field!r}, got {fields}")
        return Document(label, text)


def open_lines(path: Path) -> BinaryIO:
    """Open a .jsonl, .jsonl.gz or .jsonl.zst file for reading its bytes."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix != ".zst":
        return path.open("rb")
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f'{path} needs the package zstandard: pip install "effkern[train]"') from error
    # Parallel writers put many frames into one file, and long-distance matching uses windows beyond the default.
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(path.open("rb"), read_across_frames=True)
    return _ZstdLines(reader, zstandard.ZstdError)


class _ZstdLines(io.BufferedReader):
    """Lines of a zstd stream; its own error type becomes OSError, as other unreadable files raise."""

    def __init__(self, reader: Any, error: type[Exception]) -> None:
        super().__init__(reader, buffer_size=1 << 20)
        self._error = error

    def __next__(self) -> bytes:
        try:
            return super().__next__()
        except self._error as error:
            raise OSError(f"broken zstd stream: {error}") from None


def _find(name: str) -> Iterator[tuple[str, Path]]:
    """(label, path) of each file; labels are relative, so that nothing depends on where the folder lies."""
    path = Path(name).expanduser()
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"sources: a file must end in one of {' '.join(SUFFIXES)}, got {name!r}")
        yield path.name, path
    elif path.is_dir():
        for folder, folders, files in os.walk(path):
            folders[:] = [entry for entry in folders if not entry.startswith(".") and entry != "__pycache__"]
            for file in files:
                if file.endswith(SUFFIXES) and not file.startswith("."):
                    found = Path(folder, file)
                    yield found.relative_to(path).as_posix(), found
    elif glob.has_magic(name):
        fixed = _fixed_part(path)
        for match in glob.iglob(str(path), recursive=True):
            if not os.path.isdir(match):
                yield Path(os.path.relpath(match, fixed)).as_posix(), Path(match)
    else:
        raise ValueError(
            "sources: must be stdlib, stdlib-code, stdlib-docs, hf:NAME or an existing file, folder or glob, "
            f"got {name!r}"
        )


def _fixed_part(pattern: Path) -> Path:
    """The folders of a glob before its first wildcard."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
