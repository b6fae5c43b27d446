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

from effkern.data.curation.artifact import Artifact, open_artifact
from effkern.data.curation.balanced import balanced_kmeans
from effkern.data.curation.embed import Embedder
from effkern.data.curation.linkage import Dendrogram, diameter_clusters, medoids
from effkern.data.curation.pool import Pool
from effkern.data.curation.post import Projection, fit_projection
from effkern.data.curation.scores import ClusterScores, cluster_scores

__all__ = [
    "Artifact",
    "ClusterScores",
    "Dendrogram",
    "Embedder",
    "Pool",
    "Projection",
    "balanced_kmeans",
    "cluster_scores",
    "diameter_clusters",
    "fit_projection",
    "medoids",
    "open_artifact",
]
