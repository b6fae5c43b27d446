"""`PackedDataset`: a finished dataset, read by memory map."""

import json
import time
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from effkern.data.kernels import gather_windows
from effkern.data.manifest import Manifest, ShardInfo, load_manifest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Remembers which files were hashed, at which size and modification time.
STAMP = ".verified.json"
# A file younger than this may change again within the same tick of the file system's clock.
SETTLED_SECONDS = 2.0


class PackedDataset:
    """Token streams "train" and "val" of a folder that `build_dataset` wrote.

    Opening checks the size of every shard, and the sha256 of those not seen yet in their present state. What was
    hashed is remembered beside the shards, so that a large dataset is hashed once and not at every start.

    Args:
        path: the folder.
        verify: True hashes every shard now, False checks sizes alone, None (default) as said above.

    Raises:
        FileNotFoundError: no finished dataset in `path`, or a shard is missing.
        ValueError: manifest or shard was cut short or changed; the message names the file.

    Holds memory maps alone. Pickling (as worker processes do) carries the path and opens it again.
    """

    def __init__(self, path: str | Path, *, verify: bool | None = None) -> None:
        self.path = Path(path)
        self.manifest: Manifest = load_manifest(path)
        self._shards: dict[str, list[NDArray]] = {name: [] for name in self.manifest.splits}
        for shard in self.manifest.shards:
            self._shards[shard.split].append(self._map(shard))
        for name, counts in self.manifest.splits.items():
            tokens = sum(shard.size for shard in self._shards[name])
            if tokens != counts.tokens:
                raise ValueError(
                    f"PackedDataset: split {name!r} must hold {counts.tokens} tokens, got {tokens}: {path}"
                )
        if verify is not False:
            self.verify(again=verify is True)

    def _map(self, shard: ShardInfo) -> NDArray:
        file = self.path / shard.file
        if not file.is_file():
            raise FileNotFoundError(f"PackedDataset: shard is missing: {file}")
        size = file.stat().st_size
        if size != shard.bytes:
            raise ValueError(f"PackedDataset: shard must have {shard.bytes} bytes, got {size}: {file}")
        return np.memmap(file, dtype=np.dtype(shard.dtype).newbyteorder("<"), mode="r", shape=(shard.tokens,))

    def verify(self, *, again: bool = True) -> None:
        """Compare the sha256 of each shard and of the tokenizer with the manifest.

        Args:
            again: hash also the files that were found right before and have kept size and modification time.

        Raises:
            ValueError: a file was changed; the message names it.
        """
        expected = {shard.file: shard.sha256 for shard in self.manifest.shards}
        expected[self.manifest.tokenizer.file] = self.manifest.tokenizer.sha256
        known = {} if again else self._read_stamp()
        stamp: dict[str, list[int]] = {}
        for name, digest in expected.items():
            file = self.path / name
            if not file.is_file():
                raise FileNotFoundError(f"PackedDataset: file is missing: {file}")
            status = file.stat()
            state = [status.st_size, status.st_mtime_ns]
            if known.get(name) != state:
                _check_hash(file, digest)
            if time.time() - status.st_mtime > SETTLED_SECONDS:
                stamp[name] = state
        if stamp != known:
            self._write_stamp(stamp)

    def _read_stamp(self) -> dict[str, Any]:
        try:
            stamp = json.loads((self.path / STAMP).read_text("utf-8"))
            return stamp["files"] if stamp["hash"] == self.manifest.hash else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _write_stamp(self, files: dict[str, list[int]]) -> None:
        temporary = self.path / f"{STAMP}.{time.time_ns()}"
        try:
            temporary.write_text(json.dumps({"hash": self.manifest.hash, "files": files}), "utf-8")
            temporary.replace(self.path / STAMP)
        except OSError:
            # A read-only dataset is hashed at every opening.
            temporary.unlink(missing_ok=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(PackedDataset, verify=False), (self.path,)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {counts.tokens} tokens" for name, counts in self.manifest.splits.items())
        return f"PackedDataset({str(self.path)!r}: {sizes}, vocabulary {self.vocab_size})"

    @property
    def hash(self) -> str:
        """The manifest's hash: what a report quotes to say on which data it stands."""
        return self.manifest.hash

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id of the tokenizer."""
        return self.manifest.tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """The token after each document."""
        return self.manifest.tokenizer.eos_id

    def num_tokens(self, split: str = "train") -> int:
        return self.manifest.splits[self._check_split(split)].tokens

    def bytes_per_token(self, split: str = "train") -> float:
        """UTF-8 bytes of text a token: bits per byte = loss in nats / ln 2 / bytes_per_token."""
        counts = self.manifest.splits[self._check_split(split)]
        if counts.tokens == 0:
            raise ValueError(f"PackedDataset: split {split!r} must hold tokens, got 0")
        return counts.bytes / counts.tokens

    def windows(self, split: str, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """int64 [B, length]: `length` tokens of the split's stream from each start, across shards and documents."""
        return gather_windows(self._shards[self._check_split(split)], starts, length)

    def read(self, split: str, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Tokens start..stop of a split (default: all of it) as int64."""
        stop = self.num_tokens(split) if stop is None else stop
        if not 0 <= start <= stop <= self.num_tokens(split):
            tokens = self.num_tokens(split)
            raise ValueError(f"read: must have 0 <= start <= stop <= {tokens}, got start {start}, stop {stop}")
        if start == stop:
            return np.empty(0, np.int64)
        return self.windows(split, np.array([start]), stop - start)[0]

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, a new object at each call.

        Raises:
            ValueError: its file was changed since the build.
        """
        from effkern.data.tokenizer import parse_tokenizer

        file = self.path / self.manifest.tokenizer.file
        content = file.read_bytes()
        if sha256(content).hexdigest() != self.manifest.tokenizer.sha256:
            raise ValueError(f"PackedDataset: file was changed after the build (sha256 differs): {file}")
        return parse_tokenizer(content, str(file))

    def _check_split(self, split: str) -> str:
        if split not in self.manifest.splits:
            raise ValueError(f"PackedDataset: split must be one of {' '.join(self.manifest.splits)}, got {split!r}")
        return split


def _check_hash(file: Path, digest: str) -> None:
    found = sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    if found.hexdigest() != digest:
        raise ValueError(f"PackedDataset: file was changed after the build (sha256 differs): {file}")
