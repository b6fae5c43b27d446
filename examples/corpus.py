"""Real text for the examples, without a download: the reference pages and docstrings of Python itself, as bytes."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from effkern.data import Document
from effkern.data.stdlib import StdlibDocs

VOCAB = 256
SIZE = 600_000


@cache
def text() -> Tensor:
    """The first bytes of the corpus, [SIZE] int64."""
    found = bytearray()
    for document in StdlibDocs().read():
        if isinstance(document, Document):
            found += document.text.encode() + b"\n"
        if len(found) >= SIZE:
            break
    return torch.frombuffer(found[:SIZE], dtype=torch.uint8).long()


def batches(count: int, rows: int = 8, length: int = 96, seed: int = 0) -> Iterator[Tensor]:
    """`count` random batches [rows, length] of the first nine tenths."""
    generator, data = torch.Generator().manual_seed(seed), text()
    for _ in range(count):
        starts = torch.randint(0, SIZE * 9 // 10 - length, (rows,), generator=generator)
        yield torch.stack([data[start : start + length] for start in starts])


def held_out(rows: int = 16, length: int = 96) -> Tensor:
    """One batch of the last tenth, always the same."""
    return text()[-rows * length :].view(rows, length)
