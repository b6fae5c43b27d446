"""Packing and gathering: values, borders, errors, and the compiled module against its NumPy twin."""

from importlib import import_module
from types import ModuleType

import numpy as np
import pytest

from effkern.data import fallback
from effkern.data.fallback import token_dtype
from effkern.data.kernels import gather_windows
from effkern.native import load


@pytest.fixture(params=["numpy", "native"])
def impl(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "numpy":
        return fallback
    reason = load("_data")
    if reason:
        pytest.skip(reason)
    return import_module("effkern._data")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_width_changes_at_65536(impl: ModuleType, vocab_size: int, dtype: str) -> None:
    packed = impl.pack_tokens([[0], [vocab_size - 1]], vocab_size)
    assert packed.dtype == dtype == token_dtype(vocab_size)
    assert packed.tolist() == [0, vocab_size - 1]


def test_pieces_are_concatenated(impl: ModuleType) -> None:
    packed = impl.pack_tokens([[3, 1], [], [True, np.int64(7)], list(range(100))], 100)
    assert packed.tolist() == [3, 1, 1, 7, *range(100)]
    assert impl.pack_tokens([], 5).tolist() == impl.pack_tokens([[]], 5).tolist() == []


@pytest.mark.parametrize("bad", [300, -1, 70000, 2**40, 2**63, -(2**70)])
def test_id_that_does_not_fit_is_named(impl: ModuleType, bad: int) -> None:
    with pytest.raises(ValueError) as error:
        impl.pack_tokens([[1, 2], [5, bad, 301]], 300)
    assert str(error.value) == f"pack_tokens: token id must lie in [0, 300), got {bad}"


def test_wrong_types_are_named(impl: ModuleType) -> None:
    for bad, kind in [(1.5, "float"), ("a", "str"), (None, "NoneType")]:
        with pytest.raises(TypeError) as error:
            impl.pack_tokens([[1, bad]], 300)
        assert str(error.value) == f"pack_tokens: token id must be an integer, got {kind}"
    with pytest.raises(TypeError) as error:
        impl.pack_tokens([(1, 2)], 300)
    assert str(error.value) == "pack_tokens: pieces must be lists of integers, got tuple"
    for size in (0, 2**32 + 1):
        with pytest.raises(ValueError) as error:
            impl.pack_tokens([[0]], size)
        assert str(error.value) == f"pack_tokens: vocab_size must lie in [1, 2**32], got {size}"


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_windows_run_across_shards(impl: ModuleType, dtype: type) -> None:
    stream = (np.arange(50, dtype=np.int64) * 1301) % 65536
    # An empty shard, one of a single token, and windows longer than a shard.
    shards = [stream[a:b].astype(dtype) for a, b in [(0, 7), (7, 7), (7, 8), (8, 31), (31, 50)]]
    for length in (1, 5, 30, 50):
        starts = np.arange(50 - length + 1)[::-1].copy()
        windows = impl.gather_windows(shards, starts, length)
        assert windows.dtype == np.int64
        assert windows.flags.c_contiguous
        np.testing.assert_array_equal(windows, stream[starts[:, None] + np.arange(length)])
    assert impl.gather_windows(shards, np.array([], np.int64), 4).shape == (0, 4)


def test_largest_ids_stay_positive(impl: ModuleType) -> None:
    shard = np.array([0, 2**31, 2**32 - 1], np.uint32)
    assert impl.gather_windows([shard], np.array([0]), 3).tolist() == [[0, 2**31, 2**32 - 1]]


def test_window_errors(impl: ModuleType) -> None:
    shards = [np.zeros(6, np.uint16), np.zeros(4, np.uint16)]
    for bad in (-1, 8, 2**62):
        with pytest.raises(ValueError) as error:
            impl.gather_windows(shards, np.array([0, bad]), 3)
        assert str(error.value) == f"gather_windows: starts must lie in [0, 7], got {bad}"
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        impl.gather_windows(shards, np.array([0]), 0)
    with pytest.raises(ValueError, match="starts must have 1 dimension, got 2"):
        impl.gather_windows(shards, np.array([[0]]), 1)
    with pytest.raises(ValueError, match="shards must have 1 dimension, got 2"):
        impl.gather_windows([np.zeros((2, 3), np.uint16)], np.array([0]), 1)
    for mixed in ([shards[0], np.zeros(4, np.uint32)], [np.zeros(4, np.int64)], [np.zeros(8, np.uint16)[::2]]):
        with pytest.raises(TypeError, match="contiguous arrays of one dtype, uint16 or uint32"):
            impl.gather_windows(mixed, np.array([0]), 1)


def test_starts_must_be_int64() -> None:
    with pytest.raises(TypeError, match="starts must be int64, got float64"):
        gather_windows([np.zeros(6, np.uint16)], np.array([0.0]), 1)


def test_native_and_numpy_agree_on_random_input() -> None:
    reason = load("_data")
    if reason:
        pytest.skip(reason)
    native = import_module("effkern._data")
    random = np.random.default_rng(5)
    for vocab_size in (300, 65536, 65537, 200_000):
        pieces = [random.integers(0, vocab_size, size).tolist() for size in random.integers(0, 400, 30)]
        ours, twin = native.pack_tokens(pieces, vocab_size), fallback.pack_tokens(pieces, vocab_size)
        assert (ours.dtype, ours.tobytes()) == (twin.dtype, twin.tobytes())
        shards = np.split(ours, np.sort(random.integers(0, ours.size, 4)))
        starts = random.integers(0, ours.size - 129, 64)
        rows, twin_rows = native.gather_windows(shards, starts, 129), fallback.gather_windows(shards, starts, 129)
        assert rows.tobytes() == twin_rows.tobytes()
