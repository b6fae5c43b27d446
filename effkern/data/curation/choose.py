"""Which examples stay: by diversity, by score, or by lot. Every example gets its reason."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from effkern.data.curation.linkage import Dendrogram, medoids
from effkern.data.order import permute

REASONS = ("kept", "another of its cluster is closer to the mean", "its cluster was drawn out of the budget",
           "its score is too low", "not drawn")  # fmt: skip
KEPT, REDUNDANT, OVER_BUDGET, LOW_SCORE, NOT_DRAWN = range(5)


class Choice(NamedTuple):
    """See the functions that return it."""

    reason: NDArray[np.uint8]
    """Index into REASONS of each example."""
    like: NDArray[np.int64]
    """The kept example that stands for it; -1 where none does."""
    figures: dict[str, float]

    @property
    def kept(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.reason == KEPT).astype(np.int64)


def check_budget(budget: int, num: int) -> None:
    if not 1 <= budget <= num:
        raise ValueError(f"selection: budget must lie in [1, {num}], the corpus, got {budget}")


def choose_diverse(points: NDArray[np.float32], tree: Dendrogram, budget: int, seed: int) -> Choice:
    """One example of each cluster, the closest to its mean, of the coarsest cut that has `budget` clusters.

    Clusters beyond the budget are drawn out by `seed`.

    Raises:
        ValueError: budget is larger than the corpus.
    Source: arXiv 2502.02494, section on diversity.
    """
    check_budget(budget, len(points))
    eps = tree.eps_for(budget)
    labels = tree.cut(eps)
    chosen = medoids(points, labels)
    drawn = permute(np.arange(budget, dtype=np.int64), len(chosen), f"diverse:{seed}")
    inside = np.zeros(len(chosen), bool)
    inside[drawn] = True
    reason = np.where(inside[labels], REDUNDANT, OVER_BUDGET).astype(np.uint8)
    reason[chosen[inside]] = KEPT
    like = np.where(reason == REDUNDANT, chosen[labels], -1)
    sizes = np.bincount(labels)
    figures = {"eps": eps, "clusters": float(len(chosen)), "largest_cluster": float(sizes.max())}
    return Choice(reason, like, figures)


def choose_scored(scores: NDArray[np.float64], budget: int) -> Choice:
    """The highest scores; of equal ones the first examples.

    Raises:
        ValueError: budget is larger than the corpus, or a score is NaN.
    """
    check_budget(budget, len(scores))
    if np.isnan(scores).any():
        raise ValueError("selection: scores must be numbers, got NaN")
    kept = np.argsort(-scores, kind="stable")[:budget]
    reason = np.full(len(scores), LOW_SCORE, np.uint8)
    reason[kept] = KEPT
    figures = {"lowest_kept": float(scores[kept].min()), "zero_scores": float((scores == 0).sum())}
    return Choice(reason, np.full(len(scores), -1, np.int64), figures)


def choose_random(num: int, budget: int, seed: int) -> Choice:
    """Drawn without replacement."""
    check_budget(budget, num)
    reason = np.full(num, NOT_DRAWN, np.uint8)
    reason[permute(np.arange(budget, dtype=np.int64), num, f"random:{seed}")] = KEPT
    return Choice(reason, np.full(num, -1, np.int64), {})
