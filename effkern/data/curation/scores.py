"""How good a clustering is for selection: does it gather examples of like loss, and of like source?"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from effkern.data.kernels import segment_stats


@dataclass(frozen=True)
class ClusterScores:
    """See cluster_scores."""

    variance_reduction: float
    purity: float
    clusters: int
    smallest: int
    largest: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def cluster_scores(labels: NDArray[np.int64], losses: NDArray[np.float64], sources: NDArray[np.int64]) -> ClusterScores:
    """Variance reduction and purity of a clustering, means over clusters of equal weight.

    VR = Var_x l(x) / mean_j Var_{x in C_j} l(x),   purity = mean_j max_s |C_j n D_s| / |C_j|

    Variances are unbiased, so that a random partition has a VR of 1; clusters of one example have none and are left out
    of its mean. Empty clusters do not count. VR is inf where no cluster varies, NaN where none has two examples.

    Args:
        labels: int64 [N]; negative: in no cluster, counts nowhere.
        losses: float64 [N], finite.
        sources: int64 [N], at least 0.

    Raises:
        ValueError: nothing is in a cluster, a loss is not finite, or lengths differ.
    Source: arXiv 2502.02494, sections on loss correlation and purity.
    """
    inside = labels >= 0
    if not inside.any():
        raise ValueError("cluster_scores: labels must put an example into a cluster, got none")
    if not np.isfinite(losses).all():
        raise ValueError("cluster_scores: losses must be finite, got NaN or inf")
    labels, sources = (np.ascontiguousarray(x, np.int64) for x in (labels, sources))
    losses = np.ascontiguousarray(losses, np.float64)
    counts, _, squares, largest = segment_stats(
        labels, losses, sources, int(labels.max()) + 1, int(sources.max(initial=0)) + 1
    )
    used, several = counts > 0, counts > 1
    with np.errstate(divide="ignore", invalid="ignore"):
        total = losses[inside].var(ddof=1) if inside.sum() > 1 else np.nan
        within = (squares[several] / (counts[several] - 1)).mean() if several.any() else np.nan
        reduction = float(np.float64(total) / within)
    purity = float((largest[used] / counts[used]).mean())
    return ClusterScores(reduction, purity, int(used.sum()), int(counts[used].min()), int(counts[used].max()))
