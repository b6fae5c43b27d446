"""The SALT_DS score, choices under a budget, and mixing weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effkern.data.curation import diameter_clusters
from effkern.data.curation.choose import (
    KEPT,
    LOW_SCORE,
    NOT_DRAWN,
    OVER_BUDGET,
    REDUNDANT,
    choose_diverse,
    choose_random,
    choose_scored,
)
from effkern.data.curation.mix import draw, mixture
from effkern.data.curation.salt_ds import salt_ds_score


def test_score_by_hand():
    loss = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 9.0, 4.0]])
    rank = np.array([[0, 1, 2, 3], [0, 10, 99, 9], [10, 11, 12, 9], [0, 0, -1, 0]])
    # Masked: [1 2 3 4] -> 2.5; [1 0 0 4] -> 0.5; [0 0 0 8] -> 0; [1 2 4] -> 2.
    np.testing.assert_allclose(salt_ds_score(loss, rank), [2.5, 0.5, 0.0, 2.0])
    # Dropped: [1 2 3 4]; [1 4]; [8]; [1 2 4].
    np.testing.assert_allclose(salt_ds_score(loss, rank, masked="drop"), [2.5, 2.5, 8.0, 2.0])
    np.testing.assert_allclose(salt_ds_score(loss, rank, k=1), [0.0, 0.0, 0.0, 2.0])
    assert salt_ds_score(loss[:1], np.full((1, 4), -1), masked="drop").tolist() == [0.0]
    assert salt_ds_score(loss[:1], np.full((1, 4), 50), masked="drop").tolist() == [0.0]


@pytest.mark.parametrize("masked", ["zero", "drop"])
def test_score_is_numpys_median_in_any_order(masked):
    rng = np.random.default_rng(0)
    for length in (1, 2, 7, 64):
        loss, rank = rng.exponential(size=(40, length)), rng.integers(-1, 25, size=(40, length))
        truth = []
        for row, r in zip(loss, rank):
            masked_row = np.where(r < 10, row, 0.0)[r >= 0] if masked == "zero" else row[(r >= 0) & (r < 10)]
            truth.append(np.median(masked_row) if masked_row.size else 0.0)
        np.testing.assert_allclose(salt_ds_score(loss, rank, masked=masked), truth, rtol=1e-12)
        order = rng.permutation(40)
        np.testing.assert_array_equal(
            salt_ds_score(loss[order], rank[order], masked=masked), salt_ds_score(loss, rank, masked=masked)[order]
        )


def test_score_errors():
    loss, rank = np.zeros((2, 3)), np.zeros((2, 3), np.int64)
    with pytest.raises(ValueError, match=r"loss and rank must be \[N, T\]"):
        salt_ds_score(loss, rank[:1])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        salt_ds_score(loss, rank, k=0)
    with pytest.raises(ValueError, match="masked must be one of zero, drop, got 'mean'"):
        salt_ds_score(loss, rank, masked="mean")


@pytest.fixture(scope="module")
def planted():
    """50 places far apart, of 20 of them three near-copies."""
    rng = np.random.default_rng(0)
    places = 10 * rng.normal(size=(50, 4))
    owner = np.concatenate([np.arange(50), np.repeat(np.arange(20), 3)])
    points = (places[owner] + 1e-3 * rng.normal(size=(110, 4))).astype(np.float32)
    return points, owner, diameter_clusters(torch.from_numpy(points), neighbors=12)


def test_diverse_keeps_one_of_each_place(planted):
    points, owner, tree = planted
    found = choose_diverse(points, tree, 50, seed=0)
    assert sorted(owner[found.kept].tolist()) == list(range(50))
    assert (found.reason == REDUNDANT).sum() == 60
    dropped = np.flatnonzero(found.reason == REDUNDANT)
    np.testing.assert_array_equal(owner[found.like[dropped]], owner[dropped])
    assert (found.reason[found.like[dropped]] == KEPT).all()
    # A random subset of that size does not.
    drawn = choose_random(110, 50, seed=0)
    assert np.unique(owner[drawn.kept]).size < 45
    assert set(drawn.reason.tolist()) == {KEPT, NOT_DRAWN}


@pytest.mark.parametrize("budget", [1, 7, 49, 50, 51, 90, 110])
def test_diverse_keeps_the_budget(planted, budget):
    points, owner, tree = planted
    found = choose_diverse(points, tree, budget, seed=3)
    assert len(found.kept) == budget
    assert np.unique(owner[found.kept]).size == min(budget, 50)
    # What is over the budget has no one to stand for it.
    over = found.reason == OVER_BUDGET
    assert (found.like[over] == -1).all()
    np.testing.assert_array_equal(found.kept, choose_diverse(points, tree, budget, seed=3).kept)


def test_scored_keeps_the_highest():
    scores = np.array([0.5, 2.0, 0.5, 3.0, 0.0])
    found = choose_scored(scores, 3)
    assert found.kept.tolist() == [0, 1, 3]
    assert found.reason.tolist() == [KEPT, KEPT, LOW_SCORE, KEPT, LOW_SCORE]
    assert found.figures == {"lowest_kept": 0.5, "zero_scores": 1.0}
    with pytest.raises(ValueError, match="scores must be numbers, got NaN"):
        choose_scored(np.array([np.nan]), 1)


@pytest.mark.parametrize("budget", [0, 111])
def test_budgets_beyond_the_corpus(planted, budget):
    points, _, tree = planted
    message = rf"budget must lie in \[1, 110\], the corpus, got {budget}"
    for run in (
        lambda: choose_diverse(points, tree, budget, 0),
        lambda: choose_scored(np.zeros(110), budget),
        lambda: choose_random(110, budget, 0),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_mixtures_by_hand():
    assert mixture([100, 300], 40) == [10, 30]
    assert mixture([100, 300], 40, alpha=0.0) == [20, 20]
    assert mixture([100, 400], 30, alpha=0.5) == [10, 20]
    assert mixture([100, 300], 40, weights=[3, 1]) == [30, 10]
    # What the small one cannot give the others do, in their proportions.
    assert mixture([10, 100, 200], 100, weights=[1, 1, 2]) == [10, 30, 60]
    assert mixture([10, 100, 200], 100, weights=[1, 1, 2], max_epochs=2.5) == [25, 25, 50]
    assert mixture([5, 5, 5], 10) in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert mixture([5, 5], 5, weights=[0, 1]) == [0, 5]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_mixtures_add_up(data):
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
    epochs = data.draw(st.sampled_from([0.5, 1.0, 1.7, 4.0]))
    most = [int(np.floor(size * epochs + 1e-9)) for size in sizes]
    if sum(most) == 0:
        return
    windows = data.draw(st.integers(1, sum(most)))
    counts = mixture(sizes, windows, alpha=data.draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0])), max_epochs=epochs)
    assert sum(counts) == windows
    assert all(0 <= count <= limit for count, limit in zip(counts, most))


@pytest.mark.parametrize(("sizes", "windows", "options", "message"), [
    ([], 1, {}, "sizes must be at least 1"),
    ([3, 0], 1, {}, "sizes must be at least 1"),
    ([3, 4], 8, {}, r"windows must lie in \[1, 7\], what the sources with a weight give in 1 epochs, got 8"),
    ([3, 4], 5, {"weights": [1, 0]}, r"windows must lie in \[1, 3\]"),
    ([3, 4], 0, {}, r"windows must lie in \[1, 7\]"),
    ([3, 4], 2, {"weights": [1]}, "weights must be 2, one a source, got 1"),
    ([3, 4], 2, {"weights": [0, 0]}, "weights must be finite, not negative and not all 0"),
    ([3, 4], 2, {"weights": [1, -1]}, "weights must be finite, not negative and not all 0"),
    ([3, 4], 2, {"alpha": float("nan")}, "alpha must be finite"),
    ([3, 4], 2, {"max_epochs": 0.0}, "max_epochs above 0"),
])  # fmt: skip
def test_mixtures_that_cannot_be(sizes, windows, options, message):
    with pytest.raises(ValueError, match="mixture: .*" + message):
        mixture(sizes, windows, **options)


def test_draws_repeat_only_after_all():
    candidates = np.array([3, 5, 8, 13])
    assert draw(candidates, 4, "a").tolist() == [3, 5, 8, 13]
    found = draw(candidates, 10, "a")
    counts = np.unique(found, return_counts=True)[1]
    assert (found.size, counts.min(), counts.max()) == (10, 2, 3)
    assert len({tuple(draw(candidates, 2, str(key)).tolist()) for key in range(20)}) > 2
