"""The inner loops of the data path, compiled where `effkern._data` loads, else in NumPy."""

from importlib import import_module
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from effkern.data import fallback
from effkern.native import load

_native: ModuleType = fallback if load("_data") else import_module("effkern._data")


def pack_tokens(pieces: list[list[int]], vocab_size: int) -> NDArray[np.unsignedinteger]:
    """Concatenate lists of token ids into one array of the narrowest unsigned type.

    Args:
        pieces: lists of Python integers, each in [0, vocab_size).
        vocab_size: at most 2**32; up to 65536 the result is uint16, beyond it uint32.

    Raises:
        ValueError: an id does not fit; the message names it.
        TypeError: a piece is no list, or an id is no integer.
    """
    return _native.pack_tokens(pieces, vocab_size)


def gather_windows(shards: list[NDArray], starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Rows stream[start : start + length] of the stream that `shards` make up in their order.

    Args:
        shards: one-dimensional contiguous arrays, all uint16 or all uint32, usually memory maps.
        starts: int64 [B], each in [0, total - length]; a row may run across shards.
        length: tokens a row.

    Returns:
        int64 [B, length], newly allocated.
    """
    if starts.dtype != np.int64:
        raise TypeError(f"gather_windows: starts must be int64, got {starts.dtype}")
    return _native.gather_windows(shards, starts, length)


def pack_soft_labels(
    ids: NDArray[np.int32], codes: NDArray[np.int32], id_bits: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Entries of all rows behind each other, each `width` little-endian bytes: id + (code << id_bits).

    Args:
        ids: int32 [N, K], -1 in empty slots, which take no room.
        codes: int32 [N, K], each in [0, 2^(8 width - id_bits)).
        id_bits, width: of an entry; width is 3 or 4.

    Returns:
        uint8 entries, and uint16 [N] entries a row.

    Raises:
        ValueError: an id or a code does not fit, or a row has more than 65535 slots.
    """
    return _native.pack_soft_labels(ids, codes, id_bits, width)


def unpack_soft_labels(
    entries: NDArray[np.uint8],
    counts: NDArray[np.uint16],
    id_bits: int,
    width: int,
    slots: int,
    vocab: int,
    head: int,
    head_table: NDArray[np.float32],
    tail_table: NDArray[np.float32],
    log_tail: NDArray[np.float32],
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The rows that `pack_soft_labels` wrote, with a meaning for each code.

    Args:
        entries, counts, id_bits, width: as packed.
        slots: columns of the result, at least the largest count.
        vocab: ids from here on are errors.
        head: the first `head` entries of a row have logprob head_table[code], the others
            log_tail[row] + tail_table[code].

    Returns:
        int32 ids and float32 log-probabilities, [N, slots], -1 and -inf in empty slots.

    Raises:
        ValueError: sizes do not fit together, or an id or a code is outside of its range.
    """
    return _native.unpack_soft_labels(
        entries, counts, id_bits, width, slots, vocab, head, head_table, tail_table, log_tail
    )


def segment_stats(
    labels: NDArray[np.int64],
    values: NDArray[np.float64],
    sources: NDArray[np.int64],
    num_segments: int,
    num_sources: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """What a clustering's scores need of each cluster, in one pass over the examples.

    Args:
        labels: int64 [N], each below num_segments; a negative one is in no cluster.
        values: float64 [N].
        sources: int64 [N], each in [0, num_sources).

    Returns:
        counts, means, sums of squared deviations from the mean, examples of the most frequent source, [num_segments].

    Raises:
        ValueError: lengths differ, or a label or source is out of range.
    """
    return _native.segment_stats(labels, values, sources, num_segments, num_sources)


def complete_linkage(
    points: NDArray[np.float32], neighbors: NDArray[np.int64], most: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Merges (first, second, height) of reciprocal agglomerative clustering with complete linkage.

    Clusters are merged that an edge of the graph joins, each the other's nearest. Height: the largest squared distance
    between the two, over all pairs, computed where the graph lacks them; none above `most`. A cluster is named by its
    smallest member. A merge comes after those of its parts, and is no lower.

    Args:
        points: float32 [N, D].
        neighbors: int64 [N, k], -1 for none.

    Raises:
        ValueError: shapes do not fit together, or a neighbor is no point.
    """
    return _native.complete_linkage(points, neighbors, most)
