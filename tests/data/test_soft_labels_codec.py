"""Entries of soft labels in bytes: every layout, both implementations, and the error that the docstring states."""

import math
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest

from effkern.data import fallback
from effkern.data import soft_labels_codec as codec_module
from effkern.data.soft_labels_codec import NO_TAIL, Codec, LabelArrays
from effkern.native import load

LAYOUTS = {
    # method, vocab, k, draws -> width, id bits, code bits
    "sampled_17_7": (("sampled", 32000, 0, 50), (3, 17, 7)),
    "sampled_small_vocab": (("sampled", 1, 0, 127), (3, 17, 7)),
    "sampled_largest_17_7": (("sampled", 1 << 17, 0, 127), (3, 17, 7)),
    "sampled_more_draws": (("sampled", 4096, 0, 4095), (3, 12, 12)),
    "sampled_wider_vocab": (("sampled", 256000, 0, 63), (3, 18, 6)),
    "sampled_four_bytes_vocab": (("sampled", (1 << 17) + 1, 0, 127), (4, 18, 14)),
    "sampled_four_bytes_draws": (("sampled", 1 << 17, 0, 128), (4, 17, 15)),
    "topk_three_bytes": (("topk", 4096, 9, 0), (3, 12, 12)),
    "topk_four_bytes": (("topk", 4097, 9, 0), (4, 13, 19)),
    "topk_largest": (("topk", 1 << 20, 9, 0), (4, 20, 12)),
    "stratified": (("stratified", 32000, 8, 8), (4, 15, 17)),
    "stratified_small": (("stratified", 1000, 8, 2000), (3, 10, 14)),
}


@pytest.fixture(params=["numpy", "native"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels, also as the codec uses them."""
    if request.param == "native" and (reason := load("_data")):
        pytest.skip(reason)
    module = fallback if request.param == "numpy" else import_module("effkern._data")
    monkeypatch.setattr(codec_module, "pack_soft_labels", module.pack_soft_labels)
    monkeypatch.setattr(codec_module, "unpack_soft_labels", module.unpack_soft_labels)
    return module


def labels(codec: Codec, rows: int, random: np.random.Generator) -> LabelArrays:
    """What soft_labels may return: head entries fall, the rest is drawn; some rows are short, some empty."""
    ids = np.full((rows, codec.slots), -1, np.int32)
    logprobs = np.full(ids.shape, -np.inf, np.float32)
    tail = np.ones(rows, np.float32)
    for r in range(rows):
        size = int(random.integers(0, codec.slots + 1)) if r % 3 else codec.slots
        size = min(size, codec.vocab)
        chosen = random.choice(codec.vocab, size, replace=False)
        if size and r % 5 == 0:
            chosen[0] = codec.vocab - 1 if codec.vocab - 1 not in chosen else chosen[0]
        head = min(size, codec.head)
        p = np.sort(random.dirichlet(np.ones(head + 1) * 0.2))[::-1][:head].clip(1e-13) if head else np.empty(0)
        ids[r, :size] = chosen
        logprobs[r, :head] = np.log(p)
        # What is below 1e-7 is the rounding of the sum.
        tail[r] = 1.0 - p.sum() if p.sum() < 1 - 1e-7 else 0.0
        drawn = size - head
        if drawn and tail[r] > 0:
            counts = random.multinomial(codec.draws - drawn, np.ones(drawn) / drawn) + 1
            scale = tail[r] if codec.head else 1.0
            logprobs[r, head:size] = np.log(scale * counts / codec.draws)
        elif drawn:
            ids[r, head:] = -1
    lse = (random.standard_normal(rows) * 20).astype(np.float32)
    return LabelArrays(ids, logprobs, tail, lse)


@pytest.mark.parametrize(("arguments", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(arguments, layout):
    codec = Codec(*arguments)
    assert (codec.width, codec.id_bits, codec.code_bits) == layout
    assert codec.id_bits + codec.code_bits == 8 * codec.width
    assert (1 << codec.id_bits) >= codec.vocab
    assert codec.draws < 1 << codec.code_bits
    assert math.log2(32 / codec.step) == min(codec.code_bits, 15)


@pytest.mark.parametrize("arguments", [a for a, _ in LAYOUTS.values()], ids=LAYOUTS.keys())
@pytest.mark.parametrize("seed", range(4))
def test_round_trip(impl, arguments, seed):
    codec = Codec(*arguments)
    given = labels(codec, 37, np.random.default_rng(seed))
    packed = codec.pack(given)
    filled = given.ids >= 0
    assert packed.entries.nbytes == filled.sum() * codec.width
    assert packed.counts.tolist() == filled.sum(axis=1).tolist()
    got = codec.unpack(packed, codec.slots)
    np.testing.assert_array_equal(got.ids, given.ids)
    assert (got.logprobs[~filled] == -np.inf).all()
    head = np.zeros_like(filled)
    head[:, : codec.head] = True
    error = np.abs(got.logprobs - np.where(filled, given.logprobs, 0))[filled & head].max(initial=0)
    assert error <= codec.step / 2 + 1e-6
    drawn = filled & ~head
    # Counts are exact; the tail they share is stored to 1 / 4096 in its logarithm.
    bound = 1 / 4096 + 1e-5 if codec.head else 1e-6
    assert np.abs(got.logprobs - np.where(filled, given.logprobs, 0))[drawn].max(initial=0) <= bound
    np.testing.assert_allclose(got.tail[given.tail > 0], given.tail[given.tail > 0], rtol=2.5e-4, atol=1.3e-14)
    assert (got.tail[given.tail == 0] == 0).all()
    np.testing.assert_allclose(got.lse, given.lse, rtol=2**-11, atol=2**-25)
    # As narrow as the rows allow unless asked for more.
    assert codec.unpack(packed).ids.shape == (37, max(packed.counts))


def test_the_stated_bound_on_the_target():
    """L1 distance and mass of a whole vocabulary, for both step sizes; the worst case is nearly met."""
    random = np.random.default_rng(0)
    for vocab, bits in ((4096, 12), (4097, 15)):
        codec = Codec("topk", vocab, vocab)
        z = random.standard_normal((20, vocab)) * 4
        logp = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        order = np.argsort(-logp, axis=1)
        sorted_logp = np.take_along_axis(logp, order, 1).astype(np.float32)
        zero = np.zeros(20, np.float32)
        got = codec.unpack(codec.pack(LabelArrays(order.astype(np.int32), sorted_logp, zero, zero)))
        p = np.exp(sorted_logp.astype(np.float64))
        distance = np.abs(np.exp(got.logprobs.astype(np.float64)) - p).sum(axis=1)
        bound = math.expm1(32 / 2 ** (bits + 1))
        assert codec.step == 32 / 2**bits
        assert 0.2 * bound < distance.max() < bound


def test_counts_are_exact():
    for vocab, draws in ((50, 127), (50, 4095), (1 << 18, 16000)):
        codec = Codec("sampled", vocab, 0, draws)
        counts = np.unique(np.linspace(1, draws, 300).astype(int))
        ids = np.full((len(counts), codec.slots), -1, np.int32)
        ids[:, 0] = vocab - 1
        logprobs = np.full(ids.shape, -np.inf, np.float32)
        logprobs[:, 0] = np.log(counts / draws)
        ones = np.ones(len(counts), np.float32)
        got = codec.unpack(codec.pack(LabelArrays(ids, logprobs, ones, ones)))
        np.testing.assert_array_equal(got.logprobs[:, 0], logprobs[:, 0])


def test_bytes_are_little_endian(impl):
    """The format itself: a reader in another language must find these bytes."""
    entries, counts = impl.pack_soft_labels(
        np.array([[0x1F00D, -1, 5]], np.int32), np.array([[0x2A, 9, 127]], np.int32), 17, 3
    )
    assert entries.tolist() == [0x0D, 0xF0, 0x55, 0x05, 0x00, 0xFE]
    assert counts.tolist() == [2]
    entries, _ = impl.pack_soft_labels(np.array([[1]], np.int32), np.array([[(1 << 12) - 1]], np.int32), 20, 4)
    assert entries.tolist() == [1, 0, 0xF0, 0xFF]
    with_tail = Codec("topk", 4096, 2).pack(
        LabelArrays(
            np.array([[7, -1]], np.int32),
            np.array([[-1.0, -np.inf]], np.float32),
            np.array([math.exp(-1)], np.float32),
            np.array([2.5], np.float32),
        )
    )
    assert with_tail.entries.tolist() == [7, 0x00, 0x08]
    assert with_tail.tail.tolist() == [2048]
    assert with_tail.lse.tobytes() == b"\x00\x41"


def test_extreme_values():
    codec = Codec("topk", 100, 3)
    given = LabelArrays(
        np.array([[1, 2, 3], [4, 5, -1], [-1, -1, -1]], np.int32),
        np.array([[1e-7, -31.9, -5000.0], [0.0, -1e-9, -np.inf], [-np.inf] * 3], np.float32),
        np.array([1e-20, 0.0, 1.0], np.float32),
        np.array([1e30, -1e30, -0.0], np.float32),
    )
    packed = codec.pack(given)
    got = codec.unpack(packed)
    # Everything below e^-32 is stored as nearly that; log-probabilities above 0 (rounding) as 0.
    assert got.logprobs[0, 0] == 0
    assert got.logprobs[0, 1] == pytest.approx(-31.9, abs=codec.step)
    assert got.logprobs[0, 2] == -32 + codec.step
    assert got.logprobs[1, :2].tolist() == [0, 0]
    assert packed.tail.tolist() == [NO_TAIL - 1, NO_TAIL, 0]
    assert got.tail[1:].tolist() == [0, 1]
    assert got.lse.tolist() == [65504, -65504, 0]
    empty = codec.unpack(codec.pack(LabelArrays(*(part[2:] for part in vars(given).values()))))
    assert empty.ids.shape == (1, 0)
    nothing = codec.unpack(codec.pack(LabelArrays(*(part[:0] for part in vars(given).values()))))
    assert nothing.ids.shape == (0, 0)


def test_labels_that_are_none():
    codec = Codec("topk", 100, 1)
    one = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
    bad, good = np.array([np.nan], np.float32), np.array([0.5], np.float32)
    for tail, lse in ((bad, good), (good, bad), (good, np.array([np.inf], np.float32))):
        with pytest.raises(ValueError, match="Codec: lse and tail must be finite, got"):
            codec.pack(LabelArrays(*one, tail, lse))
    with pytest.raises(ValueError, match="log-probability of an id must be finite"):
        codec.pack(LabelArrays(one[0], np.full((1, 1), np.nan, np.float32), good, good))
    with pytest.raises(ValueError, match=r"pack_soft_labels: id must lie in \[0, 128\), got 128"):
        codec.pack(LabelArrays(np.full((1, 1), 128, np.int32), one[1], good, good))


CODEC_ERRORS = {
    "method": (("best", 10, 1, 0), "method must be one of topk, sampled, stratified, got 'best'"),
    "vocab": (("topk", 0, 1, 0), "must be at least 1"),
    "no_k": (("topk", 10, 0, 0), "must be at least 1"),
    "draws_of_topk": (("topk", 10, 1, 1), "must be at least 1"),
    "k_of_sampled": (("sampled", 10, 1, 1), "must be at least 1"),
    "slots": (("topk", 1 << 17, 1 << 16, 0), "a token must have at most 65535 entries, got 65536"),
    "bits": (("topk", (1 << 20) + 1, 1, 0), "an id and its value must fit into 32 bits, got 21 and 12"),
    "bits_of_draws": (("sampled", 1 << 20, 0, 5000), "an id and its value must fit into 32 bits, got 20 and 13"),
}


@pytest.mark.parametrize(("arguments", "message"), CODEC_ERRORS.values(), ids=CODEC_ERRORS.keys())
def test_codec_errors(arguments, message):
    with pytest.raises(ValueError) as caught:
        Codec(*arguments)
    assert str(caught.value).startswith("Codec: ")
    assert message in str(caught.value)


def unpack(impl, entries=(1, 0, 0), counts=(1,), **changes):
    table = np.zeros(4, np.float32)
    arguments = {
        "id_bits": 12,
        "width": 3,
        "slots": 2,
        "vocab": 100,
        "head": 2,
        "head_table": table,
        "tail_table": table,
    }
    arguments |= {"log_tail": np.zeros(len(counts), np.float32)} | changes
    return impl.unpack_soft_labels(np.array(entries, np.uint8), np.array(counts, np.uint16), **arguments)


def test_unpack_refuses_what_it_did_not_pack(impl):
    ids, _ = unpack(impl)
    assert ids.tolist() == [[1, -1]]
    cases = [
        ({"entries": (1, 0)}, "entries must have 3 bytes, got 2"),
        ({"entries": (1, 0, 0) * 2}, "entries must have 3 bytes, got 6"),
        ({"counts": (3,)}, "counts must be at most slots=2, got 3"),
        ({"entries": (100, 0, 0)}, "entries must hold ids and codes of the cache, entry 0 does not"),
        ({"entries": (1, 0, 0, 1, 0x50, 0), "counts": (2,)}, "entry 1 does not"),
        ({"entries": (1, 0x50, 0), "head": 0}, "entry 0 does not"),
        ({"log_tail": np.zeros(2, np.float32)}, "log_tail must have one value per row (1), got 2"),
        ({"width": 2}, "width must be 3 or 4 and id_bits in [1, 8 * width), got 2 and 12"),
        ({"id_bits": 24}, "got 3 and 24"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError) as caught:
            unpack(impl, **changes)
        assert str(caught.value).startswith("unpack_soft_labels: ")
        assert message in str(caught.value)


def test_pack_refuses_what_does_not_fit(impl):
    ids, codes = np.array([[3, 4]], np.int32), np.array([[1, 2]], np.int32)
    cases = [
        ((ids, codes[:, :1], 17, 3), "ids and codes must have the same two dimensions"),
        ((ids[0], codes[0], 17, 3), "ids and codes must have the same two dimensions"),
        ((ids + (1 << 17), codes, 17, 3), "id must lie in [0, 131072), got 131075"),
        ((ids, codes * 100, 17, 3), "code must lie in [0, 128), got 200"),
        ((ids, -codes, 17, 3), "code must lie in [0, 128), got -1"),
        ((ids, codes, 17, 5), "width must be 3 or 4"),
        ((np.full((1, 65536), -1, np.int32),) * 2 + (17, 3), "a row must have at most 65535 slots, got 65536"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as caught:
            impl.pack_soft_labels(*arguments)
        assert str(caught.value).startswith("pack_soft_labels: ")
        assert message in str(caught.value)


def test_native_and_numpy_give_the_same_bytes():
    if reason := load("_data"):
        pytest.skip(reason)
    native = import_module("effkern._data")
    random = np.random.default_rng(3)
    for arguments, _ in LAYOUTS.values():
        codec = Codec(*arguments)
        ids = random.integers(-1, codec.vocab, (200, 11)).astype(np.int32)
        codes = random.integers(0, min(1 << codec.code_bits, 4000), ids.shape).astype(np.int32)
        ours, twin = (m.pack_soft_labels(ids, codes, codec.id_bits, codec.width) for m in (native, fallback))
        assert [a.tobytes() for a in ours] == [a.tobytes() for a in twin]
        head_table, tail_table = (random.standard_normal(4000).astype(np.float32) for _ in range(2))
        log_tail = random.standard_normal(200).astype(np.float32)
        rest = (codec.id_bits, codec.width, 11, codec.vocab, 3, head_table, tail_table, log_tail)
        got, expected = (m.unpack_soft_labels(*ours, *rest) for m in (native, fallback))
        assert [a.tobytes() for a in got] == [a.tobytes() for a in expected]
