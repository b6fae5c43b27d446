"""The candidates: all windows of one or several packed datasets, numbered through."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effkern.data.dataset import PackedDataset
from effkern.data.order import num_windows


class Pool:
    """Windows of `seq_len` tokens of one split of each dataset; each dataset is a source.

    Window i of a dataset starts at token i * seq_len, as in training. Examples are numbered source after source.

    Raises:
        ValueError: no datasets, datasets with different tokenizers, or one without a window.
    """

    def __init__(self, paths: Sequence[str | Path], seq_len: int, split: str = "train") -> None:
        if not paths:
            raise ValueError("Pool: data must name at least one packed dataset, got none")
        self.seq_len, self.split = seq_len, split
        self.datasets = [PackedDataset(path) for path in paths]
        first = self.datasets[0]
        for dataset in self.datasets[1:]:
            if dataset.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
                raise ValueError(
                    f"Pool: datasets must have the tokenizer of {first.path}, got another in {dataset.path}"
                )
        sizes = [num_windows(dataset, split, seq_len) for dataset in self.datasets]
        for dataset, size in zip(self.datasets, sizes):
            if size == 0:
                raise ValueError(f"Pool: split {split!r} must hold a window of {seq_len} + 1 tokens: {dataset.path}")
        self.offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def eos_id(self) -> int:
        return self.datasets[0].eos_id

    @property
    def tokenizer(self) -> str:
        """sha256 of the tokenizer's file."""
        return self.datasets[0].manifest.tokenizer.sha256

    @property
    def inputs(self) -> dict[str, str]:
        """What a manifest says went in: hash, split and length of every source."""
        return {f"source{i}": f"{d.hash}:{self.split}:{self.seq_len}" for i, d in enumerate(self.datasets)}

    @property
    def places(self) -> dict[str, str]:
        return {f"source{i}": str(dataset.path) for i, dataset in enumerate(self.datasets)}

    def source(self, examples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the dataset of each example."""
        return np.searchsorted(self.offsets, examples, side="right") - 1

    def tokens(self, examples: NDArray[np.int64], extra: int = 0) -> NDArray[np.int64]:
        """int64 [B, seq_len + extra]; `extra` = 1 adds the last target."""
        if examples.size and not (examples.min() >= 0 and examples.max() < len(self)):
            got = f"{examples.min()} to {examples.max()}"
            raise ValueError(f"Pool: examples must lie in [0, {len(self)}), got {got}")
        out = np.empty((examples.size, self.seq_len + extra), np.int64)
        sources = self.source(examples)
        for number in np.unique(sources).tolist():
            rows = sources == number
            starts = (examples[rows] - self.offsets[number]) * self.seq_len
            out[rows] = self.datasets[number].windows(self.split, starts, self.seq_len + extra)
        return out


def check_inputs(step: str, pool: Pool, given: dict[str, str]) -> None:
    """Raises ValueError unless the step was made from this pool."""
    if {name: value for name, value in given.items() if name.startswith("source")} != pool.inputs:
        raise ValueError(f"{step}: must be made from the same datasets, split and seq_len as the others, got another")
