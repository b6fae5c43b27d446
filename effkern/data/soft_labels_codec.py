"""How soft labels become bytes: 3 or 4 bytes an entry, and a count, a tail mass and a log-normaliser a token.

An entry is id + (code << id_bits). Codes of a drawn id are its count. Codes of the others are quantised
log-probabilities: with b bits and step h = 32 / 2^b nats,

    code = round(-log p / h),  so |log p' - log p| <= h / 2 for p >= e^-32 (all below is stored as about e^-32)

and p' / p lies in [e^(-h/2), e^(h/2)]. The target then differs from p by at most e^(h/2) - 1 in L1, as does the
gradient of its cross entropy by twice that: 4.9e-4 at b = 15, 3.9e-3 at b = 12.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from effkern.data.kernels import pack_soft_labels, unpack_soft_labels

METHODS = ("topk", "sampled", "stratified")

# Smallest stored log-probability, and the smallest tail mass, are e^-32.
RANGE = 32.0
# Below 12 bits a probability is off by more than 1 in 250; beyond 15 nothing is gained and the table leaves the cache.
MIN_BITS, MAX_BITS = 12, 15
# Steps of a stored tail mass per nat: a relative error of 2.4e-4.
TAIL_STEPS = 2048
NO_TAIL = 65535
LARGEST_HALF = 65504.0
MAX_SLOTS = 65535


@dataclass(frozen=True)
class LabelArrays:
    """Labels of some tokens as NumPy arrays; fields as effkern.SoftLabels has them."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail: NDArray[np.float32]
    lse: NDArray[np.float32]


@dataclass(frozen=True)
class PackedLabels:
    """Labels of some tokens as they are stored."""

    entries: NDArray[np.uint8]
    counts: NDArray[np.uint16]
    tail: NDArray[np.uint16]
    lse: NDArray[np.float16]


@dataclass(frozen=True)
class Codec:
    """The stored form for one method and vocabulary.

    "sampled": 17 bits of id and 7 of count, 3 bytes, for up to 2^17 ids and 127 draws; else as many bits of id as the
    vocabulary needs, in 3 bytes where the count fits in the others, and in 4 where not.
    "topk", "stratified": 12 to 15 bits of log-probability, in 3 bytes up to 4096 ids, else in 4.

    Raises:
        ValueError: an argument is out of range, or nothing fits into 4 bytes.
    """

    method: str
    vocab: int
    k: int = 0
    draws: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Codec: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        wrong = (self.k < 1) != (self.method == "sampled") or (self.draws < 1) != (self.method == "topk")
        if self.vocab < 1 or min(self.k, self.draws) < 0 or wrong:
            raise ValueError(
                f"Codec: vocab, and k and draws where {self.method} uses them, must be at least 1 and else 0, "
                f"got {self.vocab}, {self.k}, {self.draws}"
            )
        if self.slots > MAX_SLOTS:
            raise ValueError(f"Codec: a token must have at most {MAX_SLOTS} entries, got {self.slots}")
        if self._minimal_id_bits + self._needed_bits > 32:
            raise ValueError(
                f"Codec: an id and its value must fit into 32 bits, got {self._minimal_id_bits} and "
                f"{self._needed_bits} for vocab={self.vocab}, draws={self.draws}"
            )

    @property
    def head(self) -> int:
        """Leading entries that hold a log-probability."""
        return min(self.k, self.vocab)

    @property
    def slots(self) -> int:
        """Most entries of a token."""
        return self.head + min(self.draws, self.vocab)

    @property
    def _minimal_id_bits(self) -> int:
        return max(1, (self.vocab - 1).bit_length())

    @property
    def _needed_bits(self) -> int:
        return max(self.draws.bit_length(), 0 if self.method == "sampled" else MIN_BITS)

    @property
    def width(self) -> int:
        """Bytes of an entry."""
        return 3 if self._minimal_id_bits + self._needed_bits <= 24 else 4

    @property
    def id_bits(self) -> int:
        if self.method == "sampled" and self.vocab <= 1 << 17 and self.draws <= 127:
            return 17
        return self._minimal_id_bits

    @property
    def code_bits(self) -> int:
        return 8 * self.width - self.id_bits

    @property
    def step(self) -> float:
        """h, in nats: a power of two, so that every stored log-probability is exact in float32."""
        return RANGE / (1 << min(self.code_bits, MAX_BITS))

    @property
    def count_dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.slots <= 255 else np.dtype("<u2"))

    @property
    def token_bytes(self) -> int:
        """Bytes of a token beside its entries."""
        return self.count_dtype.itemsize + 4

    @cached_property
    def _head_table(self) -> NDArray[np.float32]:
        if self.head == 0:
            return np.empty(0, np.float32)
        return (np.arange(round(RANGE / self.step)) * -self.step).astype(np.float32)

    @cached_property
    def _tail_table(self) -> NDArray[np.float32]:
        """log(count / draws)."""
        if self.draws == 0:
            return np.empty(0, np.float32)
        with np.errstate(divide="ignore"):
            return np.log(np.arange(self.draws + 1) / self.draws).astype(np.float32)

    def pack(self, labels: LabelArrays) -> PackedLabels:
        """The stored form of `labels`.

        Raises:
            ValueError: a token has no finite lse or no tail mass, so that it has no labels; a value does not fit.
        """
        if not (np.isfinite(labels.lse).all() and np.isfinite(labels.tail).all()):
            bad = int(np.argmin(np.isfinite(labels.lse) & np.isfinite(labels.tail)))
            raise ValueError(f"Codec: lse and tail must be finite, got {labels.lse[bad]} and {labels.tail[bad]}")
        with np.errstate(divide="ignore"):
            log_tail = np.log(labels.tail.astype(np.float64))
        filled = labels.ids >= 0
        logprobs = np.where(filled, labels.logprobs, 0.0).astype(np.float64)
        if not np.isfinite(logprobs).all():
            raise ValueError("Codec: the log-probability of an id must be finite, got a row where it is not")
        codes = np.zeros(labels.ids.shape, np.int32)
        head = slice(0, self.head)
        top = len(self._head_table) - 1
        codes[:, head] = np.clip(np.rint(logprobs[:, head] / -self.step), 0, top)
        drawn = slice(self.head, None)
        if self.draws:
            scale = log_tail[:, None] if self.head else 0.0
            counts = np.exp(np.where(filled[:, drawn], logprobs[:, drawn] - scale, 0.0)) * self.draws
            codes[:, drawn] = np.clip(np.rint(counts), 1, self.draws)
        entries, counts_N = pack_soft_labels(np.ascontiguousarray(labels.ids), codes, self.id_bits, self.width)
        steps = np.clip(np.rint(np.maximum(log_tail, -RANGE) * -TAIL_STEPS), 0, NO_TAIL - 1)
        steps = np.where(labels.tail > 0, steps, NO_TAIL)
        lse = np.clip(labels.lse, -LARGEST_HALF, LARGEST_HALF).astype("<f2")
        return PackedLabels(entries, counts_N, steps.astype("<u2"), lse)

    def unpack(self, packed: PackedLabels, slots: int | None = None) -> LabelArrays:
        """What `pack` stored, in `slots` columns (default: as many as the fullest token needs).

        Raises:
            ValueError: sizes do not fit together, or an entry is none of this codec.
        """
        counts = np.ascontiguousarray(packed.counts, np.uint16)
        if slots is None:
            slots = int(counts.max(initial=0))
        log_tail = np.where(packed.tail == NO_TAIL, -np.inf, packed.tail.astype(np.float32) / -TAIL_STEPS)
        log_tail = log_tail.astype(np.float32)
        ids, logprobs = unpack_soft_labels(
            np.ascontiguousarray(packed.entries),
            counts,
            self.id_bits,
            self.width,
            slots,
            self.vocab,
            self.head,
            self._head_table,
            self._tail_table,
            log_tail if self.head else np.zeros_like(log_tail),
        )
        return LabelArrays(ids, logprobs, np.exp(log_tail), packed.lse.astype(np.float32))
