"""Writing token streams to shard files of bounded size."""

import os
from hashlib import sha256
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from effkern.data.folder import BuildFolder
from effkern.data.manifest import ShardInfo

DEFAULT_SHARD_TOKENS = 1 << 26


class ShardWriter:
    """One split's stream, cut into files of `shard_tokens` tokens; the last may be shorter, none is empty.

    A shard has its final name only once it is complete and on the disk.
    """

    def __init__(self, folder: BuildFolder, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype.newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self.shards: list[ShardInfo] = []
        self.tokens = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None and kind is None:
            self._close_shard()
        elif self._file is not None:
            self._file.close()

    def write(self, tokens: NDArray[np.unsignedinteger]) -> None:
        """Append tokens to the stream."""
        tokens = tokens.astype(self._dtype, casting="equiv", copy=False)
        while tokens.size:
            file = self._file or self._open_shard()
            part = tokens[: self._shard_tokens - self._in_shard]
            content = part.view(np.uint8).data
            file.write(content)
            self._digest.update(content)
            self._in_shard += part.size
            self.tokens += part.size
            tokens = tokens[part.size :]
            if self._in_shard == self._shard_tokens:
                self._close_shard()

    def _open_shard(self) -> BinaryIO:
        self._name = self._folder.free_name(f"{self._split}-{len(self.shards):05d}.bin")
        self._file = self._folder.temporary(self._name).open("wb")
        self._digest = sha256()
        self._in_shard = 0
        return self._file

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._folder.publish(self._name)
        size = self._in_shard * self._dtype.itemsize
        kind = self._dtype.newbyteorder("=").name
        self.shards.append(ShardInfo(self._name, self._split, kind, self._in_shard, size, self._digest.hexdigest()))
