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


def pack_soft_labels(
    ids: NDArray[np.int32], codes: NDArray[np.int32], id_bits: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    _check_layout("pack_soft_labels", id_bits, width)
    if ids.ndim != 2 or ids.shape != codes.shape:
        raise ValueError("pack_soft_labels: ids and codes must have the same two dimensions")
    if ids.shape[1] > 65535:
        raise ValueError(f"pack_soft_labels: a row must have at most 65535 slots, got {ids.shape[1]}")
    kept = ids >= 0
    id_words, code_words = ids[kept].astype(np.int64), codes[kept].astype(np.int64)
    wrong = (id_words >> id_bits != 0) | (code_words < 0) | (code_words >> (8 * width - id_bits) != 0)
    if wrong.any():
        at = int(np.argmax(wrong))
        what, limit, got = ("id", 1 << id_bits, id_words[at])
        if got < limit:
            what, limit, got = ("code", 1 << (8 * width - id_bits), code_words[at])
        raise ValueError(f"pack_soft_labels: {what} must lie in [0, {limit}), got {got}")
    words = (id_words | code_words << id_bits).astype("<u4")
    return words.view(np.uint8).reshape(-1, 4)[:, :width].ravel(), kept.sum(axis=1).astype(np.uint16)


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
    _check_layout("unpack_soft_labels", id_bits, width)
    rows = len(counts)
    if len(log_tail) != rows:
        raise ValueError(f"unpack_soft_labels: log_tail must have one value per row ({rows}), got {len(log_tail)}")
    if (counts > slots).any():
        got = int(counts[counts > slots][0])
        raise ValueError(f"unpack_soft_labels: counts must be at most slots={slots}, got {got}")
    total = int(counts.sum(dtype=np.int64))
    if entries.size != total * width:
        raise ValueError(f"unpack_soft_labels: entries must have {total * width} bytes, got {entries.size}")
    padded = np.zeros((total, 4), np.uint8)
    padded[:, :width] = entries.reshape(total, width)
    words = padded.view("<u4")[:, 0].astype(np.int64)
    ids, codes = words & ((1 << id_bits) - 1), words >> id_bits
    filled = np.arange(slots) < counts[:, None]
    row, column = np.nonzero(filled)
    in_head = column < head
    wrong = (ids >= vocab) | (codes >= np.where(in_head, len(head_table), len(tail_table)))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(f"unpack_soft_labels: entries must hold ids and codes of the cache, entry {at} does not")
    out_ids = np.full((rows, slots), -1, np.int32)
    out_logprobs = np.full((rows, slots), -np.inf, np.float32)
    out_ids[filled] = ids
    values = np.empty(total, np.float32)
    values[in_head] = head_table[codes[in_head]]
    values[~in_head] = log_tail[row[~in_head]] + tail_table[codes[~in_head]]
    out_logprobs[filled] = values
    return out_ids, out_logprobs


def _check_layout(op: str, id_bits: int, width: int) -> None:
    if width not in (3, 4) or not 1 <= id_bits < 8 * width:
        raise ValueError(f"{op}: width must be 3 or 4 and id_bits in [1, 8 * width), got {width} and {id_bits}")


def segment_stats(
    labels: NDArray[np.int64],
    values: NDArray[np.float64],
    sources: NDArray[np.int64],
    num_segments: int,
    num_sources: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    if not labels.ndim == values.ndim == sources.ndim == 1 or not labels.size == values.size == sources.size:
        raise ValueError("segment_stats: labels, values and sources must be vectors of one length")
    inside = labels >= 0
    labels, values, sources = labels[inside], values[inside], sources[inside]
    wrong = (labels >= num_segments) | (sources < 0) | (sources >= num_sources)
    if wrong.any():
        raise ValueError(
            f"segment_stats: labels and sources must be below {num_segments} and {num_sources}, "
            f"got {labels[wrong][0]} and {sources[wrong][0]}"
        )
    counts = np.bincount(labels, minlength=num_segments)
    means = np.bincount(labels, weights=values, minlength=num_segments) / np.maximum(counts, 1)
    squares = np.bincount(labels, weights=(values - means[labels]) ** 2, minlength=num_segments).astype(np.float64)
    pairs = np.bincount(labels * num_sources + sources, minlength=num_segments * num_sources)
    largest = pairs.reshape(num_segments, num_sources).max(1, initial=0)
    return counts.astype(np.int64), means, squares, largest.astype(np.int64)


def complete_linkage(
    points: NDArray[np.float32], neighbors: NDArray[np.int64], most: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    if points.ndim != 2 or neighbors.ndim != 2 or len(points) != len(neighbors):
        raise ValueError("complete_linkage: points and neighbors must be [N, D] and [N, k]")
    if neighbors.size and neighbors.max() >= len(points):
        raise ValueError(f"complete_linkage: neighbors must be below {len(points)}, got {neighbors.max()}")
    wide = points.astype(np.float64)

    def farthest(a: list[int], b: list[int]) -> float:
        return float(((wide[a][:, None] - wide[b]) ** 2).sum(2).max())

    members = {i: [i] for i in range(len(points))}
    links: dict[int, dict[int, float]] = {i: {} for i in members}
    for i, row in enumerate(neighbors.tolist()):
        for j in row:
            if j >= 0 and j != i and (distance := farthest([i], [j])) <= most:
                links[i][j] = links[j][i] = distance
    merges: list[tuple[int, int, float]] = []
    while True:
        # Ties by the pair's numbers, so that some pair is always reciprocal.
        nearest = {
            a: min(near, key=lambda b: (near[b], min(a, b), max(a, b)))
            for a, near in links.items() if near
        }  # fmt: skip
        pairs = [(a, b) for a, b in nearest.items() if a < b and nearest[b] == a]
        if not pairs:
            break
        for a, b in pairs:
            merges.append((a, b, links[a][b]))
            of_a, of_b = links.pop(a), links.pop(b)
            links[a] = {}
            for c in sorted((of_a.keys() | of_b.keys()) - {a, b}):
                distance = max(
                    of[c] if c in of else farthest(members[own], members[c]) for own, of in ((a, of_a), (b, of_b))
                )
                links[c].pop(a, None)
                links[c].pop(b, None)
                if distance <= most:
                    links[a][c] = links[c][a] = distance
            members[a] += members.pop(b)
    firsts, seconds, heights = (np.array(part) for part in zip(*merges)) if merges else ([], [], [])
    return np.asarray(firsts, np.int64), np.asarray(seconds, np.int64), np.asarray(heights, np.float64)
