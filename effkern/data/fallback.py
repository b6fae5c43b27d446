"""NumPy twins of `effkern._data`: same results, same messages, used where the module was not built."""

import operator

import numpy as np
from numpy.typing import NDArray

UINT16_VOCAB = 1 << 16


def token_dtype(vocab_size: int) -> np.dtype:
    """Narrowest unsigned type that holds every id below `vocab_size`: uint16 up to 65536, else uint32."""
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"pack_tokens: vocab_size must lie in [1, 2**32], got {vocab_size}")
    return np.dtype(np.uint16 if vocab_size <= UINT16_VOCAB else np.uint32)


def pack_tokens(pieces: list[list[int]], vocab_size: int) -> NDArray[np.unsignedinteger]:
    dtype = token_dtype(vocab_size)
    for piece in pieces:
        if not isinstance(piece, list):
            raise TypeError(f"pack_tokens: pieces must be lists of integers, got {type(piece).__name__}")
    packed = np.empty(sum(map(len, pieces)), dtype)
    written = 0
    for piece in pieces:
        if piece:
            ids = np.array(piece)
            if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size:
                ids = np.array(_checked(piece, vocab_size))
            packed[written : written + len(piece)] = ids
            written += len(piece)
    return packed


def _checked(piece: list[int], vocab_size: int) -> list[int]:
    """The slow path: names the first id that does not fit, and lets pass what is an integer in disguise (bool)."""
    checked = []
    for token in piece:
        try:
            index = operator.index(token)
        except TypeError:
            message = f"pack_tokens: token id must be an integer, got {type(token).__name__}"
            raise TypeError(message) from None
        if not 0 <= index < vocab_size:
            raise ValueError(f"pack_tokens: token id must lie in [0, {vocab_size}), got {index}")
        checked.append(index)
    return checked


def gather_windows(shards: list[NDArray], starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    if starts.ndim != 1:
        raise ValueError(f"gather_windows: starts must have 1 dimension, got {starts.ndim}")
    if length < 1:
        raise ValueError(f"gather_windows: length must be at least 1, got {length}")
    for shard in shards:
        if shard.dtype != shards[0].dtype or shard.dtype not in (np.uint16, np.uint32) or not shard.flags.c_contiguous:
            raise TypeError("gather_windows: shards must be contiguous arrays of one dtype, uint16 or uint32")
        if shard.ndim != 1:
            raise ValueError(f"gather_windows: shards must have 1 dimension, got {shard.ndim}")
    # Shard k holds the tokens [first[k], first[k + 1]).
    first = np.cumsum([0, *(len(shard) for shard in shards)], dtype=np.int64)
    last = int(first[-1]) - length
    outside = starts[(starts < 0) | (starts > last)]
    if outside.size:
        raise ValueError(f"gather_windows: starts must lie in [0, {last}], got {outside[0]}")
    windows = np.empty((len(starts), length), np.int64)
    for row, start in zip(windows, starts):
        number, done = int(np.searchsorted(first, start, side="right")) - 1, 0
        while done < length:
            begin = int(start) + done - int(first[number])
            part = shards[number][begin : begin + length - done]
            row[done : done + len(part)] = part
            done += len(part)
            number += 1
    return windows
