"""Exact and near-duplicates: planted ones are found, others stay, and a stopped pass goes on."""

import json
import random

import numpy as np
import pytest

from effkern.data.curation import dedup as module
from effkern.data.curation import open_artifact
from effkern.data.curation.artifact import LOCK
from effkern.data.curation.dedup import EXACT, KEPT, NEAR, bands_for, decide, dedup, shingles, signatures
from effkern.data.curation.passes import Stopped

pytest.importorskip("rensa")

WORDS = [a + b for a in "bcdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en", "is", "ot", "um")]


def prose(seed: int, words: int = 300) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def changed(words: list[str], places: int) -> list[str]:
    """Other words in so many places, evenly spread; each changes five 5-grams."""
    step = len(words) // places
    return [f"new{i}" if i % step == 0 and i // step < places else word for i, word in enumerate(words)]


def jaccard(a: str, b: str) -> float:
    x, y = set(shingles(a, 5)), set(shingles(b, 5))
    return len(x & y) / len(x | y)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 texts of their own; of 10 an equal copy, of 10 one with 2 changed words, of 10 one with 60; in that order."""
    texts = [" ".join(prose(seed)) for seed in range(60)]
    texts += texts[:10]
    texts += [" ".join(changed(prose(seed), 2)) for seed in range(10, 20)]
    texts += [" ".join(changed(prose(seed), 60)) for seed in range(20, 30)]
    path = tmp_path_factory.mktemp("texts") / "all.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, " ", "half \ud800"]))
    return path, texts


@pytest.mark.parametrize("workers", [0, 1])
def test_planted_duplicates(corpus, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(module, "PART", 32)
    path, texts = corpus
    found = dedup([str(path)], tmp_path / "out", workers=workers)
    reason, like = found.load("reason"), found.load("like")
    assert min(jaccard(texts[70 + i], texts[10 + i]) for i in range(10)) > 0.9
    assert max(jaccard(texts[80 + i], texts[20 + i]) for i in range(10)) < 0.3
    assert reason.tolist() == [KEPT] * 60 + [EXACT] * 10 + [NEAR] * 10 + [KEPT] * 10
    assert like.tolist() == [-1] * 60 + list(range(20)) + [-1] * 10
    kept = [json.loads(line)["text"] for line in (tmp_path / "out" / "kept.jsonl").read_text().splitlines()]
    assert kept == texts[:60] + texts[80:]
    assert found.results["documents"] == {"kept": 70, "exact duplicate": 10, "near-duplicate": 10}
    assert found.results["kept_bytes"] == sum(len(text) for text in kept)
    assert found.hash == open_artifact(tmp_path / "out").hash
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {
        LOCK, "curation.json", "kept.jsonl", *(f"{name}.npy" for name in found.arrays if name != "kept.jsonl")
    }  # fmt: skip


def test_the_estimate_is_unbiased():
    """Mean over 40 pairs of the estimate against the Jaccard similarity itself, within 4 standard errors."""
    pairs = [(prose(seed), changed(prose(seed), 2 + seed % 9)) for seed in range(40)]
    a, b = (signatures([" ".join(pair[i]) for pair in pairs], 5, 128, 0) for i in (0, 1))
    truth = np.array([jaccard(" ".join(x), " ".join(y)) for x, y in pairs])
    error = (a == b).mean(1) - truth
    bound = 4 * np.sqrt((truth * (1 - truth) / 128).sum()) / len(pairs)
    assert abs(error.mean()) < bound


def test_bands_find_what_is_at_the_threshold():
    for threshold in (0.3, 0.5, 0.8, 0.95, 1.0):
        bands, rows = bands_for(threshold, 128)
        assert bands * rows == 128
        assert 1 - (1 - threshold**rows) ** bands >= 0.95
    assert bands_for(1.0, 128) == (1, 128)


def test_chains_point_to_what_stays():
    """b is like a, c equals b: c, too, is told to be like a. d is like b alone, which went: d stays."""
    rng = np.random.default_rng(0)
    a = rng.integers(2**32, size=64, dtype=np.uint32)
    b = np.where(np.arange(64) < 6, a + 1, a).astype(np.uint32)
    d = np.where(np.arange(64) > 55, b + 1, b).astype(np.uint32)
    keys = np.array([[i] * 16 for i in (1, 2, 2, 3)], np.uint8)
    reason, like, similarity = decide(keys, np.stack([a, b, b, d]), 0.8)
    assert reason.tolist() == [KEPT, NEAR, EXACT, KEPT]
    assert like.tolist() == [-1, 0, 0, -1]
    np.testing.assert_allclose(similarity, [0, 58 / 64, 1, 0])


def test_a_stopped_pass_goes_on(corpus, tmp_path, monkeypatch):
    """After a stop the finished parts are not made again, and the result is that of one go."""
    monkeypatch.setattr(module, "PART", 20)
    path, _ = corpus
    made = []
    plain = signatures
    monkeypatch.setattr(module, "signatures", lambda *a: made.append(len(a[0])) or plain(*a))
    asked = iter([False, False, True])
    with pytest.raises(Stopped, match="stopped after 40 documents"):
        dedup([str(path)], tmp_path / "out", stop=lambda: next(asked))
    with pytest.raises(FileNotFoundError, match="must hold a finished step"):
        open_artifact(tmp_path / "out")
    with pytest.raises(ValueError, match="unfinished step with other settings"):
        dedup([str(path)], tmp_path / "out", threshold=0.5)
    again = dedup([str(path)], tmp_path / "out")
    assert made == [20, 20, 20, 20, 10]
    assert again.hash == dedup([str(path)], tmp_path / "whole").hash
    with pytest.raises(FileExistsError, match="must not hold a finished step unless overwrite"):
        dedup([str(path)], tmp_path / "out")
    assert dedup([str(path)], tmp_path / "out", threshold=0.5, overwrite=True).hash != again.hash


def test_a_changed_file_is_seen(corpus, tmp_path):
    found = dedup([str(corpus[0])], tmp_path / "out")
    file = tmp_path / "out" / "like.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"file was changed .*like\.npy"):
        found.load("like")
    manifest = tmp_path / "out" / "curation.json"
    manifest.write_text(manifest.read_text().replace('"threshold": 0.8', '"threshold": 0.7'))
    with pytest.raises(ValueError, match="its hash does not match its content"):
        open_artifact(tmp_path / "out")


@pytest.mark.parametrize(("options", "message"), [
    ({"threshold": 0.0}, r"threshold must lie in \(0, 1\], got 0\.0"),
    ({"threshold": 1.5}, r"threshold must lie in \(0, 1\], got 1\.5"),
    ({"ngram": 0}, "ngram must be at least 1, got 0"),
    ({"num_perm": 8}, "num_perm must be at least 16, got 8"),
    ({"workers": -1}, "workers must be at least 0, got -1"),
])  # fmt: skip
def test_errors(corpus, tmp_path, options, message):
    with pytest.raises(ValueError, match="dedup: " + message):
        dedup([str(corpus[0])], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_to_read(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="sources must hold text, got none"):
        dedup([str(tmp_path / "blank.txt")], tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="got other files"):
        dedup([str(tmp_path / "blank.txt")], tmp_path / "other")
    assert (tmp_path / "other" / "file").read_text() == "mine"
