"""One shard file of a soft-label cache.

    header    64 bytes: magic, version, shard number, windows, entries, sha256 of all that follows and is said before
    entries   entries x width bytes, all tokens of all windows behind each other, padded to 8
    offsets   int64 [windows + 1]: first entry of each window
    counts    uint8 or uint16 [windows x seq_len], padded to 8
    tail      uint16 [windows x seq_len]
    lse       float16 [windows x seq_len]

Everything is little-endian. The hash also covers the spec, so that a shard of another cache is none of this one.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effkern.data.soft_labels_codec import PackedLabels
from effkern.data.soft_labels_spec import FORMAT_VERSION, LabelShard, LabelSpec

MAGIC = b"EFFKSOFT"
_HEADER = struct.Struct("<8sIIQQ32s")
_BLOCK = 1 << 20


def shard_name(shard: int) -> str:
    return f"labels-{shard:05d}.bin"


def _align(size: int) -> int:
    return -size % 8


@dataclass(frozen=True)
class Sections:
    """Where the parts of a shard begin, and its size."""

    offsets: int
    counts: int
    tail: int
    lse: int
    size: int

    @staticmethod
    def of(spec: LabelSpec, shard: int, entries: int) -> "Sections":
        windows = spec.shard_size(shard)
        tokens = windows * spec.seq_len
        packed, counted = entries * spec.codec.width, tokens * spec.codec.count_dtype.itemsize
        offsets = _HEADER.size + packed + _align(packed)
        counts = offsets + 8 * (windows + 1)
        tail = counts + counted + _align(counted)
        return Sections(offsets, counts, tail, tail + 2 * tokens, tail + 4 * tokens)


class ShardFile:
    """Writes one shard under a temporary name; it has its final name only when it is complete and on the disk."""

    def __init__(self, folder: Path, spec: LabelSpec, shard: int) -> None:
        self._folder, self._spec, self._shard = folder, spec, shard
        self._temporary = folder / f".tmp-{shard_name(shard)}"
        self._file = self._temporary.open("wb")
        self._file.write(bytes(_HEADER.size))
        self._digest = sha256()
        self._offsets = [0]
        self._tokens: list[PackedLabels] = []

    def write(self, packed: PackedLabels) -> None:
        """Append whole windows."""
        content = packed.entries.data
        self._file.write(content)
        self._digest.update(content)
        counts = packed.counts.reshape(-1, self._spec.seq_len).sum(axis=1, dtype=np.int64)
        self._offsets += (self._offsets[-1] + counts.cumsum()).tolist()
        self._tokens.append(packed)

    def finish(self) -> LabelShard:
        spec, entries = self._spec, self._offsets[-1]
        assert len(self._offsets) == spec.shard_size(self._shard) + 1
        counts = np.concatenate([part.counts for part in self._tokens]).astype(spec.codec.count_dtype)
        for content in (
            bytes(_align(entries * spec.codec.width)),
            np.array(self._offsets, "<i8").tobytes(),
            counts.tobytes(),
            bytes(_align(counts.nbytes)),
            np.concatenate([part.tail for part in self._tokens]).astype("<u2", copy=False).tobytes(),
            np.concatenate([part.lse for part in self._tokens]).astype("<f2", copy=False).tobytes(),
        ):
            self._file.write(content)
            self._digest.update(content)
        windows = spec.shard_size(self._shard)
        head = (MAGIC, FORMAT_VERSION, self._shard, windows, entries)
        digest = _seal(self._digest, spec, head)
        size = self._file.tell()
        self._file.seek(0)
        self._file.write(_HEADER.pack(*head, digest))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._folder / shard_name(self._shard))
        assert size == Sections.of(spec, self._shard, entries).size
        return LabelShard(shard_name(self._shard), windows, entries, size, digest.hex())

    def discard(self) -> None:
        """Close and remove what is unfinished."""
        # A full disk also refuses what the buffer still holds.
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _seal(digest: Any, spec: LabelSpec, head: tuple[object, ...]) -> bytes:
    digest.update(_HEADER.pack(*head, bytes.fromhex(spec.hash)))
    return digest.digest()


def read_header(file: Path, spec: LabelSpec, shard: int) -> LabelShard:
    """What a shard file says of itself, checked against the spec and the file's size.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is cut short, or none of this cache; the message names it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"soft labels: shard is missing: {file}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        raw = stream.read(_HEADER.size)
    if len(raw) < _HEADER.size:
        raise ValueError(f"soft labels: shard must have at least {_HEADER.size} bytes, got {size}: {file}")
    magic, version, number, windows, entries, digest = _HEADER.unpack(raw)
    expected = (MAGIC, FORMAT_VERSION, shard, spec.shard_size(shard))
    if (magic, version, number, windows) != expected:
        raise ValueError(f"soft labels: shard must be number {shard} of format version {FORMAT_VERSION}: {file}")
    wanted = Sections.of(spec, shard, entries).size
    if size != wanted:
        raise ValueError(f"soft labels: shard must have {wanted} bytes, got {size}: {file}")
    return LabelShard(file.name, windows, entries, size, digest.hex())


def check_content(file: Path, spec: LabelSpec, shard: int) -> LabelShard:
    """`read_header`, and the hash of the whole file. Raises as that does."""
    info = read_header(file, spec, shard)
    digest = sha256()
    for block in _blocks(file):
        digest.update(block)
    if _seal(digest, spec, (MAGIC, FORMAT_VERSION, shard, info.windows, info.entries)).hex() != info.sha256:
        raise ValueError(f"soft labels: shard was changed after it was written (its hash does not match): {file}")
    return info


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(_HEADER.size)
        while block := stream.read(_BLOCK):
            yield block


class ShardMap:
    """A shard, memory-mapped."""

    def __init__(self, file: Path, spec: LabelSpec, shard: int, info: LabelShard) -> None:
        parts = Sections.of(spec, shard, info.entries)
        raw: NDArray[np.uint8] = np.memmap(file, dtype=np.uint8, mode="r", shape=(info.bytes,))
        self._seq_len, self._width = spec.seq_len, spec.codec.width
        self._entries = raw[_HEADER.size : _HEADER.size + info.entries * self._width]
        self._offsets = raw[parts.offsets : parts.counts].view("<i8")
        tokens = info.windows * spec.seq_len
        counts = raw[parts.counts : parts.counts + tokens * spec.codec.count_dtype.itemsize]
        self._counts = counts.view(spec.codec.count_dtype)
        self._tail, self._lse = raw[parts.tail : parts.lse].view("<u2"), raw[parts.lse :].view("<f2")

    def window(self, number: int) -> PackedLabels:
        """The labels of one window, `number` counted within the shard."""
        first, last = int(self._offsets[number]), int(self._offsets[number + 1])
        tokens = slice(number * self._seq_len, (number + 1) * self._seq_len)
        entries = self._entries[first * self._width : last * self._width]
        return PackedLabels(entries, self._counts[tokens], self._tail[tokens], self._lse[tokens])
