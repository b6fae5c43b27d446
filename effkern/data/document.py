"""What a source gives: documents, and what it had to leave out."""

from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True)
class Document:
    """One text. `origin` is what it was taken from: documents of one origin never part between train and val.

    An empty `origin` stands for the content of the document itself.
    """

    name: str
    text: str
    origin: bytes = b""


@dataclass(frozen=True)
class Skipped:
    """Something a source could not give, and why: "not UTF-8", "unreadable: Permission denied", "empty", ..."""

    name: str
    reason: str


def content_key(text: bytes) -> bytes:
    """128 bits that stand for a text: equal texts are dropped by it, and origins are told apart by it."""
    return blake2b(text, digest_size=16).digest()
