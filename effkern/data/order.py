"""Which windows make up which batch: a pure function of seed and step, so there is no state to save."""

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from effkern.data.dataset import PackedDataset

ROUNDS = 8


def permute(indices: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Images of `indices` under the permutation of range(size) that `key` names.

    A Feistel network on the next power of four; what falls outside `size` is sent through again until it falls
    inside. Time and memory are O(len(indices)), whatever `size` is, and integer arithmetic alone makes the result
    the same on every machine and with every version of NumPy.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = np.frombuffer(blake2b(key.encode(), digest_size=8 * ROUNDS).digest(), "<u8").astype(np.uint64)
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> shift, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[outside] = left << shift | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit of the input moves every bit of the output."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def num_windows(dataset: PackedDataset, split: str, seq_len: int) -> int:
    """Windows of seq_len + 1 tokens, each overlapping the next by the one token that is only a target."""
    if seq_len < 1:
        raise ValueError(f"num_windows: seq_len must be at least 1, got {seq_len}")
    return max(0, (dataset.num_tokens(split) - 1) // seq_len)


class BatchOrder:
    """Training batches by step number.

    The split is cut into non-overlapping windows; a last incomplete one is left out. An epoch is a permutation of
    all windows, a new one each time, and batches run through the epochs without a gap: no window is dropped, and
    a batch may hold the end of one epoch and the start of the next.

    Args:
        dataset: where the tokens are.
        split: "train" or "val".
        seq_len: tokens that the model sees; a row has one more, the last target.
        batch_size: rows of the global batch, whatever the number of ranks.
        seed: any integer.
        rank, world_size: this process takes rows [rank, rank + 1) * batch_size / world_size of each batch.

    Raises:
        ValueError: a size is out of range, or the split is too small for one batch.

    Memory: O(1). Time a batch: its copy, and well below a millisecond.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        split: str = "train",
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            raise ValueError(
                f"BatchOrder: batch_size must be a positive multiple of world_size, got {batch_size} and {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"BatchOrder: rank must lie in [0, {world_size}), got {rank}")
        self.num_windows = num_windows(dataset, split, seq_len)
        if self.num_windows < batch_size:
            raise ValueError(_too_small(dataset, split, seq_len, batch_size, self.num_windows))
        self.dataset = dataset
        self.split = split
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self._rows = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every window was seen at least once."""
        return -(-self.num_windows // self.batch_size)

    def epoch(self, step: int) -> float:
        """Epochs completed before `step`."""
        return step * self.batch_size / self.num_windows

    def indices(self, step: int) -> NDArray[np.int64]:
        """Numbers of the windows in this process's rows of batch `step`."""
        return self._draw(step, self.num_windows, f"order:{self.seed}")

    def _draw(self, step: int, size: int, key: str) -> NDArray[np.int64]:
        """This process's rows of batch `step` of permutations of range(size), one after another."""
        if step < 0:
            raise ValueError(f"BatchOrder: step must be at least 0, got {step}")
        first = step * self.batch_size
        positions = np.arange(first + self._rows.start, first + self._rows.stop, dtype=np.int64)
        epochs, places = np.divmod(positions, size)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            indices[chosen] = permute(places[chosen], size, f"{key}:{epoch}")
        return indices

    def batch(self, step: int) -> NDArray[np.int64]:
        """int64 [rows, seq_len + 1]: inputs are [:, :-1], targets [:, 1:]."""
        return self.dataset.windows(self.split, self.indices(step) * self.seq_len, self.seq_len + 1)


def val_batches(
    dataset: PackedDataset, seq_len: int, batch_size: int, max_tokens: int | None = None, *, split: str = "val"
) -> Iterator[NDArray[np.int64]]:
    """Iterate over a split once, in order, in non-overlapping windows.

    Documents of a split lie in a drawn order, so a prefix is a fair sample of it.

    Args:
        dataset: where the tokens are.
        seq_len: tokens that the model sees; a row has one more.
        batch_size: rows a batch; the last batch may have fewer.
        max_tokens: stop after this many targets, rounded down to whole windows but at least one.
        split: "val" unless another is asked for.

    Returns:
        Iterator of int64 [rows, seq_len + 1].

    Raises:
        ValueError: at the call: a size is out of range, or the split does not hold one window.
    """
    count = num_windows(dataset, split, seq_len)
    if batch_size < 1:
        raise ValueError(f"val_batches: batch_size must be at least 1, got {batch_size}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"val_batches: max_tokens must be at least 1, got {max_tokens}")
    if count == 0:
        raise ValueError(_too_small(dataset, split, seq_len, 1, 0))
    if max_tokens is not None:
        count = min(count, max(1, max_tokens // seq_len))
    starts = np.arange(count, dtype=np.int64) * seq_len
    return (
        dataset.windows(split, starts[first : first + batch_size], seq_len + 1) for first in range(0, count, batch_size)
    )


def _too_small(dataset: PackedDataset, split: str, seq_len: int, batch_size: int, windows: int) -> str:
    return (
        f"split {split!r} must hold a batch of {batch_size} windows of {seq_len} + 1 tokens, "
        f"got {dataset.num_tokens(split)} tokens = {windows} windows: {dataset.path}"
    )
