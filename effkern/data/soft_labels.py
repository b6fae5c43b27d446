"""`SoftLabelCache`: a finished soft-label cache, read by memory map, and checked before it is used."""

import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effkern.data.dataset import PackedDataset
from effkern.data.soft_labels_codec import LabelArrays, PackedLabels
from effkern.data.soft_labels_shard import ShardMap, check_content, read_header
from effkern.data.soft_labels_spec import WINDOWS, LabelManifest, LabelSpec, difference, load_labels
from effkern.data.soft_labels_writer import windows_hash

# Remembers which files were hashed, at which size and modification time.
STAMP = ".verified.json"
# A file younger than this may change again within the same tick of the file system's clock.
SETTLED_SECONDS = 2.0


class SoftLabelCache:
    """Labels of the windows that a teacher was run on, by window number.

    Opening checks the size and the header of every shard, and the sha256 of those not seen yet in their present state;
    what was hashed is remembered beside them. Memory: maps, and 16 bytes a window.

    Args:
        path: the folder.
        verify: True hashes every shard now, False checks sizes alone, None (default) as said above.

    Raises:
        FileNotFoundError: no finished cache in `path`, or a shard is missing.
        ValueError: another format version, or a file was cut short or changed; the message names it.
    """

    def __init__(self, path: str | Path, *, verify: bool | None = None) -> None:
        self.path = Path(path)
        self.manifest: LabelManifest = load_labels(path)
        spec = self.spec
        self._shards: list[ShardMap] = []
        for number, shard in enumerate(self.manifest.shards):
            file = self.path / shard.file
            if read_header(file, spec, number) != shard:
                raise ValueError(f"SoftLabelCache: shard must be the one in the manifest: {file}")
            self._shards.append(ShardMap(file, spec, number, shard))
        if verify is not False:
            self._verify(again=verify is True)
        windows = np.fromfile(self.path / WINDOWS, "<i8").astype(np.int64, copy=False)
        if windows_hash(windows) != spec.windows_sha256:
            raise ValueError(f"SoftLabelCache: file was changed after it was written: {self.path / WINDOWS}")
        self._slots = np.argsort(windows)
        self._windows = windows[self._slots]

    @property
    def spec(self) -> LabelSpec:
        return self.manifest.spec

    @property
    def hash(self) -> str:
        """Stands for the content: what a checkpoint keeps to be resumed with the same labels."""
        return self.manifest.hash

    def _verify(self, again: bool) -> None:
        known = {} if again else self._read_stamp()
        stamp: dict[str, list[int]] = {}
        for number, shard in enumerate(self.manifest.shards):
            file = self.path / shard.file
            status = file.stat()
            state = [status.st_size, status.st_mtime_ns]
            if known.get(shard.file) != state:
                check_content(file, self.spec, number)
            if time.time() - status.st_mtime > SETTLED_SECONDS:
                stamp[shard.file] = state
        if stamp != known:
            self._write_stamp(stamp)

    def _read_stamp(self) -> dict[str, list[int]]:
        try:
            stamp = json.loads((self.path / STAMP).read_text("utf-8"))
            return stamp["files"] if stamp["hash"] == self.hash else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _write_stamp(self, files: dict[str, list[int]]) -> None:
        temporary = self.path / f"{STAMP}.{time.time_ns()}"
        try:
            temporary.write_text(json.dumps({"hash": self.hash, "files": files}), "utf-8")
            temporary.replace(self.path / STAMP)
        except OSError:
            # A read-only cache is hashed at every opening.
            temporary.unlink(missing_ok=True)

    def check(self, dataset: PackedDataset, *, seq_len: int, split: str = "train") -> None:
        """Labels belong to one packing of one dataset: raise ValueError naming everything in which this is another."""
        asked = {
            "tokenizer": dataset.manifest.tokenizer.sha256,
            "dataset": dataset.hash,
            "seq_len": seq_len,
            "split": split,
        }
        made = {name: getattr(self.spec, name) for name in asked}
        wrong = [difference(name, made[name], asked[name]) for name in asked if made[name] != asked[name]]
        if wrong:
            raise ValueError(
                f"soft labels of {self.path} must be used with what they were made from, got\n  " + "\n  ".join(wrong)
            )

    def missing(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of `windows` that have no labels."""
        return windows[self._find(windows) < 0]

    def _find(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place of each window in the files, or -1."""
        at = np.minimum(np.searchsorted(self._windows, windows), len(self._windows) - 1)
        return np.where(self._windows[at] == windows, self._slots[at], -1)

    def read(self, windows: NDArray[np.int64], slots: int | None = None) -> LabelArrays:
        """Labels of all tokens of `windows`, [B * seq_len, K] and [B * seq_len], in their order.

        Args:
            windows: window numbers as data.order gives them; any order, repeats allowed.
            slots: K; default as many as the fullest of these tokens needs.

        Raises:
            ValueError: a window has no labels, or `slots` is too small.
        """
        places = self._find(windows)
        if (places < 0).any():
            raise ValueError(
                f"SoftLabelCache: windows must have labels, got {windows[places < 0][0]} without: {self.path}"
            )
        shards, numbers = np.divmod(places, self.spec.shard_windows)
        parts = [self._shards[shard].window(number) for shard, number in zip(shards.tolist(), numbers.tolist())]
        if not parts:
            raise ValueError("SoftLabelCache: windows must hold at least one number, got none")
        packed = PackedLabels(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("entries", "counts", "tail", "lse"))
        )
        return self.spec.codec.unpack(packed, slots)
