"""Batches: every window once an epoch, a pure function of seed and step, the same order for any number of ranks."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from effkern.data import BatchOrder, PackedDataset, val_batches
from effkern.data.order import permute

Build = Callable[..., PackedDataset]
SEQ = 16
FROZEN = [363, 814, 747, 155, 599, 657, 295, 470]


@pytest.fixture
def dataset(build: Build) -> PackedDataset:
    return build(shard_tokens=1000)


def window_rows(dataset: PackedDataset, split: str) -> list[tuple[int, ...]]:
    stream = dataset.read(split)
    return [tuple(stream[at : at + SEQ + 1].tolist()) for at in range(0, len(stream) - SEQ, SEQ)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    image = permute(np.arange(size), size, "key")
    assert sorted(image.tolist()) == list(range(size))
    # Any part can be asked for alone.
    assert permute(np.array([size - 1, 0]), size, "key").tolist() == [image[-1], image[0]]


def test_permute_is_frozen() -> None:
    """Fixed forever: a run that resumes under another version must see the same batches."""
    assert permute(np.arange(8), 1000, "order:0:0").tolist() == FROZEN
    big = permute(np.arange(1000), 10**15, "order:0:0")
    assert np.unique(big).size == 1000
    assert 0.45e15 < big.mean() < 0.55e15


def test_permute_is_even_over_keys() -> None:
    """All 24 orders of four windows turn up about equally often: chi-square, 23 degrees, p about 1e-6."""
    counts = Counter(tuple(permute(np.arange(4), 4, f"order:{seed}:0").tolist()) for seed in range(4800))
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 72


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_epoch_holds_every_window_once(dataset: PackedDataset, batch_size: int) -> None:
    order = BatchOrder(dataset, seq_len=SEQ, batch_size=batch_size, seed=3)
    rows = window_rows(dataset, "train")
    assert order.num_windows == len(rows)
    assert order.steps_per_epoch == -(-len(rows) // batch_size)
    steps = -(-2 * len(rows) // batch_size)
    batches = np.concatenate([order.batch(step) for step in range(steps)])
    assert batches.dtype == np.int64
    for epoch in range(2):
        seen = batches[epoch * len(rows) : (epoch + 1) * len(rows)]
        assert Counter(map(tuple, seen.tolist())) == Counter(rows)
    # A new order each epoch, and not the order of the file.
    assert batches[: len(rows)].tolist() != batches[len(rows) : 2 * len(rows)].tolist()
    assert batches[: len(rows)].tolist() != [list(row) for row in rows]
    assert order.epoch(len(rows)) == batch_size


def test_resume_at_any_step(dataset: PackedDataset) -> None:
    undisturbed = [BatchOrder(dataset, seq_len=SEQ, batch_size=8, seed=1).batch(step).tolist() for step in range(60)]
    order = BatchOrder(PackedDataset(dataset.path), seq_len=SEQ, batch_size=8, seed=1)
    assert [order.batch(step).tolist() for step in range(37, 60)] == undisturbed[37:]
    assert order.batch(2).tolist() == undisturbed[2]


def test_inputs_and_targets_are_shifted_by_one(dataset: PackedDataset) -> None:
    order = BatchOrder(dataset, seq_len=SEQ, batch_size=4)
    stream = dataset.read("train")
    for row, index in zip(order.batch(5), order.indices(5)):
        np.testing.assert_array_equal(row[1:], stream[index * SEQ + 1 : (index + 1) * SEQ + 1])


def test_seeds_differ(dataset: PackedDataset) -> None:
    orders = [BatchOrder(dataset, seq_len=SEQ, batch_size=8, seed=seed) for seed in (0, 1, -1, 2**70)]
    assert len({order.batch(0).tobytes() for order in orders}) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_one_order(dataset: PackedDataset, world_size: int) -> None:
    whole = BatchOrder(dataset, seq_len=SEQ, batch_size=6, seed=9)
    ranks = [
        BatchOrder(dataset, seq_len=SEQ, batch_size=6, seed=9, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    # Steps on both sides of the end of an epoch.
    for step in (0, 1, whole.steps_per_epoch - 1, whole.steps_per_epoch):
        together = np.concatenate([order.batch(step) for order in ranks])
        np.testing.assert_array_equal(together, whole.batch(step))


def test_val_batches_are_the_windows_in_order(dataset: PackedDataset) -> None:
    rows = window_rows(dataset, "val")
    batches = list(val_batches(dataset, SEQ, 4))
    assert [len(batch) for batch in batches] == [4] * (len(rows) // 4) + [len(rows) % 4] * (len(rows) % 4 > 0)
    assert [tuple(row) for row in np.concatenate(batches).tolist()] == rows
    for max_tokens, count in [(1, 1), (SEQ * 5 + 3, 5), (10**9, len(rows))]:
        assert np.concatenate(list(val_batches(dataset, SEQ, 4, max_tokens))).tolist() == [
            list(r) for r in rows[:count]
        ]
    train = np.concatenate(list(val_batches(dataset, SEQ, 4, split="train")))
    assert [tuple(row) for row in train.tolist()] == window_rows(dataset, "train")


def test_window_needs_its_last_target(build: Build) -> None:
    dataset = build(val_fraction=0)
    tokens = dataset.num_tokens()
    # tokens - 1 inputs have a target; one token less would not do.
    assert BatchOrder(dataset, seq_len=tokens - 1, batch_size=1).num_windows == 1
    with pytest.raises(ValueError) as error:
        BatchOrder(dataset, seq_len=tokens, batch_size=1)
    assert str(error.value) == (
        f"split 'train' must hold a batch of 1 windows of {tokens} + 1 tokens, "
        f"got {tokens} tokens = 0 windows: {dataset.path}"
    )
    with pytest.raises(ValueError, match=r"split 'val' must hold a batch of 1 windows of 8 \+ 1 tokens, got 0 tokens"):
        val_batches(dataset, 8, 1)


def test_bad_arguments(dataset: PackedDataset) -> None:
    with pytest.raises(ValueError, match="batch_size must be a positive multiple of world_size, got 6 and 4"):
        BatchOrder(dataset, seq_len=SEQ, batch_size=6, world_size=4)
    with pytest.raises(ValueError, match="batch_size must be a positive multiple of world_size, got 0 and 1"):
        BatchOrder(dataset, seq_len=SEQ, batch_size=0)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\), got 2"):
        BatchOrder(dataset, seq_len=SEQ, batch_size=6, world_size=2, rank=2)
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        BatchOrder(dataset, seq_len=0, batch_size=6)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        BatchOrder(dataset, seq_len=SEQ, batch_size=6).batch(-1)
    with pytest.raises(ValueError, match="windows of"):
        BatchOrder(dataset, seq_len=SEQ, batch_size=10**6)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        val_batches(dataset, SEQ, 0)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        val_batches(dataset, SEQ, 1, 0)
