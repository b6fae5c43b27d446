"""Exact and near-duplicates of documents, before anything is packed.

Two passes over the sources. The first makes keys and MinHash signatures, in parallel, in parts that survive a stop; the
second writes what stays to kept.jsonl, from which `effkern data build` packs. In between every document is held
against those before it: equal text is an exact duplicate; an estimated Jaccard similarity of its word n-grams of at
least `threshold` with a document that stays is a near one. Of like documents the first stays.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effkern.data.curation.artifact import Artifact, begin, finish, write_array
from effkern.data.curation.passes import Stopped
from effkern.data.document import Document, Skipped, content_key
from effkern.data.sources import resolve_sources

KEPT, EXACT, NEAR = 0, 1, 2
REASONS = ("kept", "exact duplicate", "near-duplicate")
PART = 512
# A pair at the threshold is a candidate with at least this probability.
RECALL = 0.95


def bands_for(threshold: float, num_perm: int) -> tuple[int, int]:
    """(bands, rows of a band): the widest bands that find a pair at the threshold with probability RECALL."""
    for rows in sorted((r for r in range(1, num_perm + 1) if num_perm % r == 0), reverse=True):
        if 1 - (1 - threshold**rows) ** (num_perm // rows) >= RECALL:
            return num_perm // rows, rows
    return num_perm, 1


def shingles(text: str, ngram: int) -> list[str]:
    """Word n-grams in lower case; of a shorter text all words as one."""
    words = text.lower().split()
    return [" ".join(words[i : i + ngram]) for i in range(max(1, len(words) - ngram + 1))]


def signatures(texts: Sequence[str], ngram: int, num_perm: int, seed: int) -> NDArray[np.uint32]:
    """MinHash signatures [len(texts), num_perm]; equal entries estimate the Jaccard similarity of the n-grams."""
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise ImportError('near-duplicates need the package rensa: pip install "effkern[curation]"') from error
    found = RMinHash.digests_from_token_sets([shingles(text, ngram) for text in texts], num_perm, seed)
    return np.array(found, np.uint32).reshape(len(texts), num_perm)


def decide(
    keys: NDArray[np.uint8], digests: NDArray[np.uint32], threshold: float
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float32]]:
    """(reason, number of the document it is like or -1, similarity) of each document, in their order."""
    num, num_perm = digests.shape
    bands, rows = bands_for(threshold, num_perm)
    reason, like = np.zeros(num, np.uint8), np.full(num, -1, np.int64)
    similarity = np.zeros(num, np.float32)
    by_key: dict[bytes, int] = {}
    buckets: list[dict[bytes, list[int]]] = [{} for _ in range(bands)]
    for i in range(num):
        key = keys[i].tobytes()
        if key in by_key:
            # What its twin is like, it is like.
            twin = by_key[key]
            reason[i], like[i], similarity[i] = EXACT, twin if reason[twin] == KEPT else like[twin], 1.0
            continue
        by_key[key] = i
        parts = [digests[i, b * rows : (b + 1) * rows].tobytes() for b in range(bands)]
        candidates = sorted({j for bucket, part in zip(buckets, parts) for j in bucket.get(part, ())})
        if candidates:
            same = (digests[candidates] == digests[i]).mean(1)
            best = int(same.argmax())
            if same[best] >= threshold:
                reason[i], like[i], similarity[i] = NEAR, candidates[best], same[best]
                continue
        for bucket, part in zip(buckets, parts):
            bucket.setdefault(part, []).append(i)
    return reason, like, similarity


def dedup(
    sources: Sequence[str],
    out: str | Path,
    *,
    threshold: float = 0.8,
    ngram: int = 5,
    num_perm: int = 128,
    seed: int = 0,
    text_field: str = "text",
    workers: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, str], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Write kept.jsonl (text, name, source) and, for every document, why it stayed or went.

    Args:
        sources: as for `build_dataset`.
        out: folder of the step; an unfinished one of the same call is taken up.
        threshold: of the estimated similarity, in (0, 1]; its standard error is sqrt(s (1 - s) / num_perm).
        ngram: words of a shingle, at least 1.
        num_perm: values of a signature, at least 16.
        workers: processes that make signatures; 0 is this one.
        progress: called with (documents so far, stage).
        stop: asked after each part.

    Raises:
        ValueError: an option is out of range, no text was found, or the sources changed between the passes.
        Stopped: `stop` said so; the same call goes on.
        FileExistsError: as `artifact.begin` says.
        ImportError: rensa is not installed.

    Memory: num_perm x 4 + about 200 bytes a document, and one part of texts per worker.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"dedup: threshold must lie in (0, 1], got {threshold}")
    for name, value, low in (("ngram", ngram, 1), ("num_perm", num_perm, 16), ("workers", workers, 0)):
        if value < low:
            raise ValueError(f"dedup: {name} must be at least {low}, got {value}")
    found = resolve_sources(sources, text_field)
    settings = {"threshold": threshold, "ngram": ngram, "num_perm": num_perm, "seed": seed, "text_field": text_field}
    inputs = {f"name{i}": source.name for i, source in enumerate(found)}
    with begin(out, "dedup", settings, inputs, overwrite) as folder:
        report = progress or (lambda done, stage: None)

        def documents() -> Iterator[tuple[int, Document]]:
            for number, source in enumerate(found):
                for item in source.read():
                    # What cannot be text is left to `build_dataset`'s own list; it is in no file that we write.
                    if not isinstance(item, Skipped) and item.text.strip() and _is_text(item.text):
                        yield number, item

        keys, digests = _sign(documents(), folder, ngram, num_perm, seed, workers, report, stop)
        if not len(keys):
            names = ", ".join(source.name for source in found)
            raise ValueError(f"dedup: sources must hold text, got none in {names}")
        reason, like, similarity = decide(keys, digests, threshold)
        owner, sizes = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
        digest = hashlib.sha256()
        temporary = folder / ".tmp-kept.jsonl"
        with temporary.open("wb") as file:
            for i, (number, item) in enumerate(documents()):
                if i >= len(keys) or content_key(item.text.encode()) != keys[i].tobytes():
                    raise ValueError(f"dedup: sources must not change meanwhile, {item.name} did")
                owner[i], sizes[i] = number, len(item.text.encode())
                if reason[i] == KEPT:
                    record = {"text": item.text, "name": item.name, "source": found[number].name}
                    line = (json.dumps(record) + "\n").encode()
                    file.write(line)
                    digest.update(line)
                report(i + 1, "writing")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / "kept.jsonl")
        arrays: dict[str, NDArray] = {
            "reason": reason,
            "like": like,
            "similarity": similarity,
            "source": owner,
            "bytes": sizes,
        }
        results = _results(reason, owner, sizes, [source.name for source in found])
        results["content"] = hashlib.sha256(keys.tobytes()).hexdigest()
        return finish(folder, "dedup", settings, inputs, arrays, results, files={"kept.jsonl": digest.hexdigest()})


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sign(
    documents: Iterator[tuple[int, Document]],
    folder: Path,
    ngram: int,
    num_perm: int,
    seed: int,
    workers: int,
    report: Callable[[int, str], None],
    stop: Callable[[], bool],
) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Keys [N, 16] and signatures [N, num_perm] of all documents; parts that are there are not computed again."""
    keys: list[NDArray[np.uint8]] = []
    digests: list[NDArray[np.uint32]] = []
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers else None
    try:
        number = done = 0
        while True:
            # A round is one part per worker.
            parts = [part for _ in range(max(1, workers)) if (part := [d.text for _, d in islice(documents, PART)])]
            if not parts:
                break
            if stop():
                raise Stopped(f"stopped after {done:,} documents")
            pending: list[Any] = []
            for offset, texts in enumerate(parts):
                own = np.frombuffer(b"".join(content_key(text.encode()) for text in texts), np.uint8).reshape(-1, 16)
                keys.append(own)
                known = _known(folder, number + offset, own)
                if known is not None:
                    pending.append(known)
                elif pool:
                    pending.append(pool.submit(signatures, texts, ngram, num_perm, seed))
                else:
                    pending.append(signatures(texts, ngram, num_perm, seed))
            for offset, item in enumerate(pending):
                values = item if isinstance(item, np.ndarray) else item.result()
                _write_part(folder, number + offset, keys[number + offset], values)
                digests.append(values)
                done += len(values)
                report(done, "signatures")
            number += len(parts)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    if not keys:
        return np.empty((0, 16), np.uint8), np.empty((0, num_perm), np.uint32)
    return np.concatenate(keys), np.concatenate(digests)


def _known(folder: Path, number: int, keys: NDArray[np.uint8]) -> NDArray[np.uint32] | None:
    """The signatures of a part, if those that are there are of the same texts."""
    file, of = folder / f".part-{number:06d}.npy", folder / f".keys-{number:06d}.npy"
    if not file.exists() or not of.exists() or not np.array_equal(np.load(of, allow_pickle=False), keys):
        return None
    return np.load(file, allow_pickle=False)


def _write_part(folder: Path, number: int, keys: NDArray[np.uint8], values: NDArray[np.uint32]) -> None:
    file = folder / f".part-{number:06d}.npy"
    if not file.exists() or _known(folder, number, keys) is None:
        write_array(file, values)
        write_array(folder / f".keys-{number:06d}.npy", keys)


def _results(reason: NDArray, owner: NDArray, sizes: NDArray, names: Sequence[str]) -> dict[str, Any]:
    def count(rows: NDArray) -> dict[str, int]:
        return {text: int((reason[rows] == code).sum()) for code, text in enumerate(REASONS)}

    by_source = {name: count(owner == i) for i, name in enumerate(names)}
    total = count(np.ones(len(reason), bool))
    kept = int(sizes[reason == KEPT].sum())
    return {"documents": total, "by_source": by_source, "bytes": int(sizes.sum()), "kept_bytes": kept}


def dropped_examples(artifact: Artifact, limit: int) -> list[tuple[int, int, str, float]]:
    """(document, the one it is like, reason, similarity) of the first dropped documents, near ones first."""
    reason, like, similarity = (artifact.load(name) for name in ("reason", "like", "similarity"))
    near, exact = np.flatnonzero(reason == NEAR), np.flatnonzero(reason == EXACT)
    rows = islice(chain(near.tolist(), exact.tolist()), limit)
    return [(i, int(like[i]), REASONS[reason[i]], float(similarity[i])) for i in rows]
