"""The two inner loops of the data path, compiled where `effkern._data` loads, else in NumPy."""

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
