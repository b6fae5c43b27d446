"""The texts of a build on their way from sources to shards: one temporary file, and an index in memory.

Every document is read once, so training the tokenizer and encoding see the same bytes, whatever happens to the
sources meanwhile. The index takes about 150 bytes a document.
"""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effkern.data.document import Document, content_key
from effkern.data.manifest import SkippedFile

# A list of everything that was left out could outgrow the corpus; the counts are always complete.
MAX_LISTED = 10_000


@dataclass
class Losses:
    """What did not get into the dataset: duplicates by source, skipped files by source and by reason."""

    duplicates: Counter[int] = field(default_factory=Counter)
    skipped: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    listed: list[SkippedFile] = field(default_factory=list)

    def skip(self, source: int, source_name: str, name: str, reason: str) -> None:
        self.skipped[source] += 1
        self.reasons[reason.partition(":")[0]] += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(SkippedFile(source_name, name, reason))


class DocumentSpool:
    """Distinct documents: append them with `add`, then read them back by number.

    The split of a document follows from its origin and the seed, its place in the split from its content and the
    seed. Neither depends on file names or on the order of sources.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self._file = path.open("w+b")
        self._seed = seed
        self._seen: set[bytes] = set()
        self._offsets = array("Q", [0])
        self._sources = array("L")
        self._origins = array("Q")
        self._places = array("Q")

    def __len__(self) -> int:
        return len(self._sources)

    def __enter__(self) -> "DocumentSpool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def num_bytes(self) -> int:
        return self._offsets[-1]

    def add(self, document: Document, text: bytes, source: int) -> bool:
        """Append a document, `text` being its UTF-8 bytes; False if the same text is there already."""
        key = content_key(text)
        if key in self._seen:
            return False
        self._seen.add(key)
        self._file.write(text)
        self._offsets.append(self._offsets[-1] + len(text))
        self._sources.append(source)
        self._origins.append(self._draw("split", document.origin or key))
        self._places.append(self._draw("place", key))
        return True

    def _draw(self, purpose: str, key: bytes) -> int:
        return int.from_bytes(blake2b(f"{purpose}:{self._seed}:".encode() + key, digest_size=8).digest(), "little")

    def text(self, number: int) -> str:
        start, stop = self._offsets[number], self._offsets[number + 1]
        self._file.seek(start)
        return self._file.read(stop - start).decode()

    def size(self, number: int) -> int:
        """UTF-8 bytes of a document."""
        return self._offsets[number + 1] - self._offsets[number]

    def source(self, number: int) -> int:
        return self._sources[number]

    def split(self, val_fraction: float) -> dict[str, NDArray[np.int64]]:
        """Numbers of the documents of "train" and "val", each in its order.

        An origin is in val where its draw falls below `val_fraction`. With two origins or more neither side stays
        empty; a single one is train.
        """
        origins = np.array(self._origins, np.uint64)
        in_val = origins < np.uint64(int(val_fraction * (1 << 64)))
        if val_fraction > 0 and np.unique(origins).size > 1:
            in_val |= (origins == origins.min()) & (not in_val.any())
        in_val &= ~((origins == origins.max()) & in_val.all())
        order = np.argsort(np.array(self._places, np.uint64), kind="stable")
        return {"train": order[~in_val[order]], "val": order[in_val[order]]}
