"""Choosing what to train on. NumPy and torch; `rensa` for near-duplicates.

artifact passes     folders with manifests and hashes; long passes that survive a stop
pool                the candidates: windows of packed datasets
embed post          LM-token and LM-output embeddings; standardise, project, scale
balanced linkage    clusters of bounded size, and of bounded diameter
scores              variance reduction and purity of a clustering
dedup               exact and near-duplicates of documents
salt_ds choose mix  the SALT_DS score; what is kept, and why; mixing weights
steps report        all of it over packed datasets, one folder a step; a page about it
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effkern.data.curation.artifact import Artifact as Artifact
    from effkern.data.curation.artifact import open_artifact as open_artifact
    from effkern.data.curation.balanced import balanced_kmeans as balanced_kmeans
    from effkern.data.curation.embed import Embedder as Embedder
    from effkern.data.curation.linkage import Dendrogram as Dendrogram
    from effkern.data.curation.linkage import diameter_clusters as diameter_clusters
    from effkern.data.curation.linkage import medoids as medoids
    from effkern.data.curation.pool import Pool as Pool
    from effkern.data.curation.post import Projection as Projection
    from effkern.data.curation.post import fit_projection as fit_projection
    from effkern.data.curation.scores import ClusterScores as ClusterScores
    from effkern.data.curation.scores import cluster_scores as cluster_scores

# Names are loaded when they are used: the trainer, which reads a selection, needs one class of all this.
_HOME = {
    "Artifact": "artifact",
    "ClusterScores": "scores",
    "Dendrogram": "linkage",
    "Embedder": "embed",
    "Pool": "pool",
    "Projection": "post",
    "balanced_kmeans": "balanced",
    "cluster_scores": "scores",
    "diameter_clusters": "linkage",
    "fit_projection": "post",
    "medoids": "linkage",
    "open_artifact": "artifact",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'effkern.data.curation' has no attribute {name!r}")
    return getattr(import_module(f"effkern.data.curation.{_HOME[name]}"), name)
