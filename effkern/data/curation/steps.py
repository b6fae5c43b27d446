"""The steps of curation over packed datasets: each reads finished steps and leaves one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from effkern.data.curation.artifact import Artifact, begin, finish, open_artifact
from effkern.data.curation.balanced import balanced_kmeans
from effkern.data.curation.choose import REASONS, Choice, choose_diverse, choose_random, choose_scored
from effkern.data.curation.embed import Embedder
from effkern.data.curation.linkage import Dendrogram, diameter_clusters
from effkern.data.curation.passes import Progress, run_parts
from effkern.data.curation.pool import Pool, check_inputs
from effkern.data.curation.post import fit_projection
from effkern.data.curation.salt_ds import Scorer
from effkern.data.curation.scores import cluster_scores
from effkern.data.order import permute
from effkern.models import Decoder

# Examples of a part of a long pass, and of one call of the model.
PART = 4096
BATCH = 32
SELECTIONS = ("diverse", "salt-ds", "random")
CLUSTERINGS = ("balanced", "diameter")

Stop = Callable[[], bool]


def _never() -> bool:
    return False


def pool_of(step: Artifact) -> Pool:
    """The candidates that a step was made from.

    Raises:
        ValueError: a dataset is not the one that it was.
    """
    names = [name for name in step.inputs if name.startswith("source")]
    _, split, seq_len = step.inputs[names[0]].split(":")
    pool = Pool([step.places[name] for name in names], int(seq_len), split)
    check_inputs(step.kind, pool, step.inputs)
    return pool


def _apart(name: str, step: Artifact, out: str | Path) -> None:
    if step.path.resolve() == Path(out).resolve():
        raise ValueError(f"{name}: out must be another folder than the step that is read, got {out}")


def input_of(step: Artifact, name: str, *kinds: str) -> Artifact:
    """A step that `step` was made from, in the state in which it was."""
    found = open_artifact(step.places[name], *kinds)
    if found.hash != step.inputs[name]:
        raise ValueError(f"{step.kind}: {name} must be the step that it was made from, got another in {found.path}")
    return found


def embed(
    model: Decoder,
    weights: str,
    pool: Pool,
    out: str | Path,
    *,
    kind: str = "token",
    components: int = 64,
    fit_examples: int = 100_000,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: Stop = _never,
) -> Artifact:
    """Embeddings of all examples, float32 [N, components] of length 1.

    Mean, scale and components are fitted on `fit_examples` examples drawn by `seed`.

    Args:
        weights: hash of the model's weights.
        Others: of `Embedder`, `fit_projection`, `artifact.begin`, `run_parts`.
    """
    embedder = Embedder(model, pool, kind)
    fitted = min(fit_examples, len(pool))
    settings = {"kind": kind, "components": components, "fit_examples": fitted, "seed": seed}
    inputs = {"model": weights, **pool.inputs}
    most = min(model.config.hidden_size, fitted - 1)
    if not 1 <= components <= most:
        raise ValueError(f"embed: components must lie in [1, {most}] (width of the model, examples), got {components}")
    with begin(out, "embeddings", settings, inputs, overwrite) as folder:
        sample = np.sort(permute(np.arange(fitted, dtype=np.int64), len(pool), f"fit:{seed}"))
        raw = [embedder.raw(sample[i : i + BATCH]) for i in range(0, len(sample), BATCH)]
        projection = fit_projection(np.concatenate(raw), components)
        found = run_parts(
            folder, len(pool), PART, BATCH, lambda rows: embedder.projected(rows, projection), progress, stop
        )
        arrays: dict[str, NDArray] = {
            "embeddings": found, "mean": projection.mean, "scale": projection.scale, "components": projection.components
        }  # fmt: skip
        results = {"examples": len(pool), "explained_variance": projection.explained}
        return finish(folder, "embeddings", settings, inputs, arrays, results, pool.places)


def score(
    model: Decoder,
    weights: str,
    pool: Pool,
    out: str | Path,
    *,
    k: int = 10,
    masked: str = "zero",
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: Stop = _never,
) -> Artifact:
    """Mean loss and SALT_DS score of all examples."""
    scorer = Scorer(model, pool, k=k, masked=masked)
    settings, inputs = {"k": k, "masked": masked}, {"model": weights, **pool.inputs}
    with begin(out, "scores", settings, inputs, overwrite) as folder:
        found = run_parts(folder, len(pool), PART, BATCH, scorer, progress, stop)
        loss, values, learnable = found.T
        results = {
            "examples": len(pool), "mean_loss": float(loss.mean()), "mean_score": float(values.mean()),
            "zero_scores": int((values == 0).sum()), "tokens_in_top_k": float(learnable.mean()),
        }  # fmt: skip
        columns = zip(("loss", "score", "learnable"), found.T)
        arrays = {name: np.ascontiguousarray(column) for name, column in columns}
        return finish(folder, "scores", settings, inputs, arrays, results, pool.places)


def cluster(
    embeddings: Artifact,
    out: str | Path,
    *,
    method: str = "balanced",
    size: int = 50,
    iterations: int = 20,
    neighbors: int = 16,
    max_diameter: float | None = None,
    seed: int = 0,
    scores: Artifact | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> Artifact:
    """Clusters of bounded size (labels) or of bounded diameter (all merges).

    With `scores` of a checkpoint of the target, a balanced clustering gets its variance reduction and purity, beside
    those of a partition drawn by lot into clusters of the same sizes.
    """
    if method not in CLUSTERINGS:
        raise ValueError(f"cluster: method must be one of {', '.join(CLUSTERINGS)}, got {method!r}")
    _apart("cluster", embeddings, out)
    pool = pool_of(embeddings)
    settings: dict[str, Any] = {"method": method}
    if method == "balanced":
        settings |= {"size": size, "iterations": iterations, "seed": seed}
    else:
        settings |= {"neighbors": neighbors, "max_diameter": max_diameter}
    inputs = {"embeddings": embeddings.hash, **pool.inputs}
    places = {"embeddings": str(embeddings.path), **pool.places}
    points = torch.from_numpy(embeddings.load("embeddings")).to(device)
    with begin(out, "clusters", settings, inputs, overwrite) as folder:
        if method == "balanced":
            labels = balanced_kmeans(points, size, iterations=iterations, seed=seed)
            counts = np.bincount(labels)
            results: dict[str, Any] = {
                "clusters": len(counts), "smallest": int(counts.min()), "largest": int(counts.max())
            }  # fmt: skip
            if scores is not None:
                check_inputs("scores", pool, scores.inputs)
                losses, sources = scores.load("loss"), pool.source(np.arange(len(pool)))
                shuffled = labels[permute(np.arange(len(pool), dtype=np.int64), len(pool), f"partition:{seed}")]
                results["scores"] = cluster_scores(labels, losses, sources).as_dict()
                results["random_partition"] = cluster_scores(shuffled, losses, sources).as_dict()
            return finish(folder, "clusters", settings, inputs, {"labels": labels}, results, places)
        limit = float("inf") if max_diameter is None else max_diameter
        tree = diameter_clusters(points, neighbors=neighbors, max_diameter=limit)
        results = {"merges": len(tree.heights), "fewest_clusters": tree.num_clusters(np.inf)}
        arrays = {"merges": tree.merges, "heights": tree.heights}
        return finish(folder, "clusters", settings, inputs, arrays, results, places)


def select(
    step: Artifact, out: str | Path, *, method: str, budget: int, seed: int = 0, overwrite: bool = False
) -> Artifact:
    """Examples to keep: of a diameter clustering ("diverse"), of scores ("salt-ds"), of any step ("random").

    Raises:
        ValueError: budget is larger than the corpus, or the step is not of the kind that the method needs.
    """
    if method not in SELECTIONS:
        raise ValueError(f"select: method must be one of {', '.join(SELECTIONS)}, got {method!r}")
    _apart("select", step, out)
    pool = pool_of(step)
    chosen = _choose(step, pool, method, budget, seed)
    settings = {"method": method, "budget": budget, "seed": seed}
    inputs = {"step": step.hash, **pool.inputs}
    with begin(out, "selection", settings, inputs, overwrite) as folder:
        sources = pool.source(np.arange(len(pool)))
        by_source = {
            place: {"kept": int((sources[chosen.kept] == i).sum()), "of": int((sources == i).sum())}
            for i, place in enumerate(pool.places.values())
        }
        reasons = {text: int((chosen.reason == code).sum()) for code, text in enumerate(REASONS)}
        results = {
            "kept": len(chosen.kept), "of": len(pool), "tokens": len(chosen.kept) * pool.seq_len,
            "by_source": by_source, "reasons": {text: count for text, count in reasons.items() if count},
            **chosen.figures,
        }  # fmt: skip
        arrays: dict[str, NDArray] = {"kept": chosen.kept, "reason": chosen.reason, "like": chosen.like}
        places = {"step": str(step.path), **pool.places}
        return finish(folder, "selection", settings, inputs, arrays, results, places)


def _choose(step: Artifact, pool: Pool, method: str, budget: int, seed: int) -> Choice:
    if method == "random":
        return choose_random(len(pool), budget, seed)
    if method == "salt-ds":
        if step.kind != "scores":
            raise ValueError(f"select: step must be scores for method=salt-ds, got {step.kind} in {step.path}")
        return choose_scored(step.load("score"), budget, seed)
    if step.kind != "clusters" or "merges" not in step.arrays:
        raise ValueError(f"select: step must be clusters of method=diameter for method=diverse, got {step.path}")
    points = input_of(step, "embeddings", "embeddings").load("embeddings")
    return choose_diverse(points, Dendrogram(len(pool), step.load("merges"), step.load("heights")), budget, seed)


def replay(selection: Artifact, out: str | Path, *, overwrite: bool = False) -> Artifact:
    """Make a selection again from the steps that it names.

    Raises:
        ValueError: a step or a dataset has changed, or the result is another.
    """
    step = input_of(selection, "step")
    settings = selection.settings
    found = select(
        step, out, method=settings["method"], budget=settings["budget"], seed=settings["seed"], overwrite=overwrite
    )
    if found.hash != selection.hash:
        raise ValueError(f"select: replay must give {selection.hash[:12]}, got {found.hash[:12]} in {found.path}")
    return found


def candidates(pool: Pool, selection: Artifact | None) -> Sequence[NDArray[np.int64]]:
    """Examples of each source from which a mixture is drawn: those selected, or all."""
    examples = np.arange(len(pool), dtype=np.int64)
    if selection is not None:
        check_inputs("mix", pool, selection.inputs)
        examples = selection.load("kept")
    owners = pool.source(examples)
    return [examples[owners == i] for i in range(len(pool.datasets))]
