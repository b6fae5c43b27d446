"""`effkern data dedup | embed | score | cluster | select | mix | report`: the steps of curation on the command line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from effkern.data.curation.artifact import Artifact, open_artifact
from effkern.data.curation.passes import Stopped
from effkern.data.curation.pool import Pool
from effkern.train.progress import reporter_for
from effkern.train.signals import StopRequest

if TYPE_CHECKING:
    from effkern.train.restore import LoadedModel


def dedup(
    out: Path,
    sources: tuple[str, ...],
    threshold: float = 0.8,
    ngram: int = 5,
    num_perm: int = 128,
    seed: int = 0,
    text_field: str = "text",
    workers: int = -1,
    overwrite: bool = False,
) -> int:
    """Drop exact and near-duplicate documents; writes OUT/kept.jsonl for `effkern data build --sources`.

    Args:
        out: folder of the step. The same command goes on behind the last part of an interrupted run.
        sources: as for `effkern data build`.
        threshold: estimated Jaccard similarity of word n-grams from which a document is a near-duplicate.
        ngram: words of an n-gram.
        num_perm: values of a MinHash signature.
        seed: of the signatures.
        text_field: field of a jsonl record.
        workers: processes; -1 is one per core, 0 none but this one.
        overwrite: replace what is in OUT.
    """
    from effkern.data.curation.dedup import dedup as run

    # How many documents there are is known at the end.
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} documents")
    console = Console()
    with (
        StopRequest() as request,
        Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("dedup", total=None)
        try:
            found = run(
                sources, out, threshold=threshold, ngram=ngram, num_perm=num_perm, seed=seed, text_field=text_field,
                workers=(os.cpu_count() or 1) if workers < 0 else workers, overwrite=overwrite,
                progress=lambda done, stage: bar.update(task, completed=done, description=f"dedup: {stage}"),
                stop=lambda: request.signum is not None,
            )  # fmt: skip
        except Stopped as stopped:
            return _stopped(stopped, request)
    counts = found.results["documents"]
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return _done(found)


def embed(
    out: Path,
    data: tuple[Path, ...],
    checkpoint: Path,
    kind: Literal["token", "output"] = "token",
    components: int = 64,
    fit_examples: int = 100_000,
    seq_len: int = 0,
    split: Literal["train", "val"] = "train",
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Embed every window of packed datasets by a trained proxy model.

    Args:
        out: folder of the step. The same command goes on behind the last part of an interrupted run.
        data: packed datasets with the proxy's tokenizer; each is a source.
        checkpoint: run directory or step directory of the proxy.
        kind: token: means of its embedding table; output: means of its last hidden states.
        components: kept of the principal component analysis.
        fit_examples: windows on which mean, scale and components are fitted.
        seq_len: tokens of a window; 0 takes the length of the proxy's training.
        split: part of the datasets.
        seed: of the draw of `fit_examples`.
        device: auto, cpu or cuda.
        overwrite: replace what is in OUT.
    """
    from effkern.data.curation import steps

    loaded, pool = _load(checkpoint, data, seq_len, split, device)
    return _pass(
        "embed", len(pool),
        lambda progress, stop: steps.embed(
            loaded.model, loaded.weights_hash, pool, out, kind=kind, components=components, fit_examples=fit_examples,
            seed=seed, overwrite=overwrite, progress=progress, stop=stop,
        ),
    )  # fmt: skip


def score(
    out: Path,
    data: tuple[Path, ...],
    checkpoint: Path,
    k: int = 10,
    masked: Literal["zero", "drop"] = "zero",
    seq_len: int = 0,
    split: Literal["train", "val"] = "train",
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Mean loss and SALT_DS score of every window under a model.

    Args:
        out: folder of the step. The same command goes on behind the last part of an interrupted run.
        data: packed datasets with the model's tokenizer; each is a source.
        checkpoint: run directory or step directory; the score wants an early one of a small model.
        k: tokens among the k likeliest count as learnable.
        masked: what the others are to the median: zero, or dropped.
        seq_len: tokens of a window; 0 takes the length of the model's training.
        split: part of the datasets.
        device: auto, cpu or cuda.
        overwrite: replace what is in OUT.
    """
    from effkern.data.curation import steps

    loaded, pool = _load(checkpoint, data, seq_len, split, device)
    return _pass(
        "score", len(pool),
        lambda progress, stop: steps.score(
            loaded.model, loaded.weights_hash, pool, out, k=k, masked=masked, overwrite=overwrite, progress=progress,
            stop=stop,
        ),
    )  # fmt: skip


def cluster(
    out: Path,
    embeddings: Path,
    method: Literal["balanced", "diameter"] = "diameter",
    size: int = 50,
    iterations: int = 20,
    neighbors: int = 16,
    max_diameter: float | None = None,
    seed: int = 0,
    scores: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Cluster embeddings: into sizes from a fifth to five times `size`, or by diameter.

    Args:
        out: folder of the step.
        embeddings: folder of `embed`.
        method: balanced: for variance reduction and purity; diameter: for `select --method diverse`.
        size: mean size of balanced clusters.
        iterations: of K-means.
        neighbors: edges of a point in the graph of the diameter clustering.
        max_diameter: no cluster above this squared distance; it bounds time and memory.
        seed: of K-means.
        scores: folder of `score` of the target: prints variance reduction and purity of balanced clusters.
        device: auto, cpu or cuda, for products; the merging is on the CPU.
        overwrite: replace what is in OUT.
    """
    from effkern.data.curation import steps
    from effkern.train.device import choose_device

    found = steps.cluster(
        open_artifact(embeddings, "embeddings"), out, method=method, size=size, iterations=iterations,
        neighbors=neighbors, max_diameter=max_diameter, seed=seed, overwrite=overwrite, device=choose_device(device),
        scores=None if scores is None else open_artifact(scores, "scores"),
    )  # fmt: skip
    return _done(found)


def select(
    out: Path,
    step: Path | None = None,
    budget: int = 0,
    method: Literal["diverse", "salt-ds", "random"] = "diverse",
    seed: int = 0,
    replay: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Choose windows to train on, with a reason for each; or make an earlier selection again.

    Args:
        out: folder of the step.
        step: folder of `cluster --method diameter` (diverse), of `score` (salt-ds), of any step (random).
        budget: windows to keep.
        method: diverse: one of each cluster; salt-ds: the highest scores; random: by lot.
        seed: of what is drawn.
        replay: folder of a selection: made again from the steps that it names, and held against its hash.
        overwrite: replace what is in OUT.
    """
    from effkern.data.curation import steps

    if (replay is None) == (step is None):
        raise ValueError("select: one of step and replay must be given")
    if replay is not None:
        return _done(steps.replay(open_artifact(replay, "selection"), out, overwrite=overwrite))
    assert step is not None
    found = open_artifact(step, "embeddings", "scores", "clusters")
    return _done(steps.select(found, out, method=method, budget=budget, seed=seed, overwrite=overwrite))


def mix(
    out: Path,
    windows: int,
    selection: Path | None = None,
    data: tuple[Path, ...] = (),
    seq_len: int = 0,
    weights: tuple[float, ...] = (),
    alpha: float = 1.0,
    max_epochs: float = 1.0,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Pack a mixture of windows into a dataset for `effkern train`.

    Args:
        out: folder of the dataset to create.
        windows: windows of the mixture.
        selection: folder of `select`: its windows are drawn from, its datasets are the sources.
        data: packed datasets to draw from, without a selection.
        seq_len: tokens of a window, with `data`.
        weights: shares of the sources, in their order.
        alpha: without weights: shares proportional to size^alpha; 1 as they are, 0 all alike.
        max_epochs: how often a window may come at most.
        seed: of what is drawn.
        overwrite: replace a finished dataset in OUT.
    """
    import numpy as np

    from effkern.data.curation import mix as mixing
    from effkern.data.curation import steps

    if (selection is None) == (not data):
        raise ValueError("mix: one of selection and data must be given")
    chosen = None if selection is None else open_artifact(selection, "selection")
    if chosen is None and seq_len < 1:
        raise ValueError(f"mix: seq_len must be at least 1 with data, got {seq_len}")
    pool = Pool(data, seq_len) if chosen is None else steps.pool_of(chosen)
    groups = steps.candidates(pool, chosen)
    for place, group in zip(pool.places.values(), groups):
        if not group.size:
            raise ValueError(f"mix: selection must keep a window of every source, got none of {place}")
    counts = mixing.mixture(
        [len(group) for group in groups], windows, weights=weights or None, alpha=alpha, max_epochs=max_epochs
    )
    examples = np.concatenate([
        mixing.draw(group, count, f"mix:{seed}:{i}") for i, (group, count) in enumerate(zip(groups, counts))
    ])  # fmt: skip
    settings = {
        "weights": list(weights) or None, "alpha": alpha, "max_epochs": max_epochs, "seed": seed, "windows": windows,
        "counts": counts, "selection": chosen.hash if chosen else None, "sources": pool.inputs,
    }  # fmt: skip
    reporter = reporter_for("mix", windows, 0)
    try:
        dataset = mixing.write_mixture(
            out, pool, examples, settings, overwrite=overwrite,
            progress=lambda done, total: reporter.update(done, "windows"),
        )  # fmt: skip
    finally:
        reporter.close()
    shares = ", ".join(f"{count:,} of {place}" for place, count in zip(pool.places.values(), counts))
    print(f"{out}: {dataset.num_tokens():,} tokens, {shares}; hash {dataset.hash[:12]}")
    return 0


def report(out: Path, steps: tuple[Path, ...]) -> int:
    """Write one HTML page of what was kept and why.

    Args:
        out: file to write.
        steps: folders of finished steps, in the order of the page.
    """
    from effkern.data.curation.report import write_report

    write_report(out, [open_artifact(step) for step in steps])
    print(out)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "dedup": dedup, "embed": embed, "score": score, "cluster": cluster, "select": select, "mix": mix, "report": report
}  # fmt: skip


def _load(
    checkpoint: Path, data: tuple[Path, ...], seq_len: int, split: str, device: str
) -> "tuple[LoadedModel, Pool]":
    from effkern.train.device import choose_device
    from effkern.train.restore import load_model

    loaded = load_model(checkpoint, choose_device(device))
    if seq_len < 0:
        raise ValueError(f"seq_len must be at least 0, got {seq_len}")
    pool = Pool(data, seq_len or loaded.meta["config"]["data"]["seq_len"], split)
    if loaded.inputs.tokenizer != pool.tokenizer:
        raise ValueError(f"data must have the tokenizer that {loaded.path} was trained with, got another one")
    return loaded, pool


def _pass(title: str, total: int, run: Callable[[Callable[[int, int], None], Callable[[], bool]], Artifact]) -> int:
    with StopRequest() as request:
        reporter = reporter_for(title, total, 0)
        try:
            found = run(lambda done, _: reporter.update(done, "examples"), lambda: request.signum is not None)
        except Stopped as stopped:
            return _stopped(stopped, request)
        finally:
            reporter.close()
    return _done(found)


def _stopped(stopped: Stopped, request: StopRequest) -> int:
    print(f"{stopped}; finished parts are kept, the same command goes on")
    return 128 + (request.signum or 0)


def _done(found: Artifact) -> int:
    for name, value in found.results.items():
        if isinstance(value, dict):
            for key, item in value.items():
                text = (
                    ", ".join(f"{k} {_number(v)}" for k, v in item.items()) if isinstance(item, dict) else _number(item)
                )
                print(f"  {name}: {key}: {text}")
        else:
            print(f"  {name}: {_number(value)}")
    print(f"{found.path}: {found.kind}, hash {found.hash[:12]}")
    return 0


def _number(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
