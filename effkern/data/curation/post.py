"""What every embedding goes through: standardise, project on the main components, scale to length 1."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Below this share of the largest standard deviation a coordinate is constant.
LEAST_SCALE = 1e-6


@dataclass(frozen=True)
class Projection:
    """x -> components ((x - mean) / scale), before the length."""

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    components: NDArray[np.float64]
    """[K, D], orthonormal rows, the largest variance first."""
    explained: float
    """Share of the standardised variance that the K components hold."""

    def __call__(self, embeddings: NDArray) -> NDArray[np.float32]:
        """Rows [N, D] -> float32 [N, K] of length 1; a row that falls on the mean stays 0."""
        found = ((embeddings - self.mean) / self.scale) @ self.components.T
        length = np.linalg.norm(found, axis=1, keepdims=True)
        return np.divide(found, length, out=np.zeros_like(found), where=length > 0).astype(np.float32)


def fit_projection(embeddings: NDArray, components: int) -> Projection:
    """Mean, standard deviation and main components of a sample [N, D].

    A constant coordinate gets scale 1, so that it counts nothing. The sign of a component is that of its largest entry.

    Raises:
        ValueError: components is not in [1, min(D, N - 1)], or a value is not finite.
    Source: arXiv 2502.02494, section on post-processing.
    """
    x = np.asarray(embeddings, np.float64)
    if x.ndim != 2 or not 1 <= components <= min(x.shape[1], len(x) - 1):
        most = min(x.shape[1], len(x) - 1) if x.ndim == 2 else 0
        raise ValueError(f"fit_projection: components must lie in [1, {most}] for {x.shape}, got {components}")
    if not np.isfinite(x).all():
        raise ValueError("fit_projection: embeddings must be finite, got NaN or inf")
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > LEAST_SCALE * max(scale.max(), 1e-30), scale, 1.0)
    z = (x - mean) / scale
    values, vectors = np.linalg.eigh(z.T @ z / len(z))
    order = np.argsort(values)[::-1][:components]
    kept = vectors[:, order].T
    signs = np.sign(kept[np.arange(components), np.abs(kept).argmax(1)])
    total = max(values.sum(), 1e-30)
    return Projection(mean, scale, kept * signs[:, None], float(values[order].sum() / total))
