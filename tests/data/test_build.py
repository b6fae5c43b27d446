"""A whole build: texts come back, duplicates go, splits and order follow from content and seed, counts add up."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from effkern.data import Document, PackedDataset, fallback, format_stats, resolve_sources, stats
from effkern.data.tokenizer import train_tokenizer
from effkern.native import load
from tests.data.conftest import documents, text

Build = Callable[..., PackedDataset]


def contents(corpus: Path) -> list[str]:
    return [item.text for source in resolve_sources([corpus]) for item in source.read() if isinstance(item, Document)]


def test_texts_come_back(build: Build, corpus: Path) -> None:
    dataset = build()
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert sorted(train + val) == sorted(contents(corpus))
    assert not set(train) & set(val)
    assert 2 <= len(val) <= 16


def test_counts_and_bytes(build: Build) -> None:
    dataset = build()
    for split in ("train", "val"):
        texts = documents(dataset, split)
        counts = dataset.manifest.splits[split]
        assert counts.documents == len(texts)
        assert counts.bytes == sum(len(item.encode()) for item in texts)
        assert counts.tokens == dataset.num_tokens(split) == len(dataset.read(split))
        assert dataset.bytes_per_token(split) == counts.bytes / counts.tokens
    numbers = stats(dataset.path)
    (source,) = numbers["sources"].values()
    for split in ("train", "val"):
        assert source[split] == numbers["splits"][split]
    table = format_stats(numbers)
    assert f"{dataset.num_tokens('train'):,}" in table
    assert dataset.hash in table


def test_duplicates_are_dropped(build: Build, corpus: Path, tmp_path: Path) -> None:
    plain = build("plain")
    (corpus / "copy.md").write_text(text(3), "utf-8")
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": text(n)}) + "\n" for n in (4, 5, 5, 99)))
    dataset = build("doubled", [corpus, tmp_path / "more.jsonl"])
    texts = documents(dataset, "train") + documents(dataset, "val")
    assert sorted(texts) == sorted({*contents(corpus), text(99)})
    assert dataset.manifest.duplicates == 4
    assert [source.duplicates for source in dataset.manifest.sources] == [1, 3]
    assert plain.manifest.duplicates == 0


def test_content_alone_decides_split_and_order(build: Build, tmp_path: Path) -> None:
    a, b, renamed = tmp_path / "a", tmp_path / "b", tmp_path / "renamed"
    for folder in (a, b, renamed):
        folder.mkdir()
    for number in range(30):
        (a if number % 2 else b).joinpath(f"{number}.txt").write_text(text(number), "utf-8")
        renamed.joinpath(f"{97 * number % 31}.md").write_text(text(number), "utf-8")
    one, two, three = build("1", [a, b]), build("2", [b, a]), build("3", [renamed])
    assert one.hash == two.hash == three.hash
    assert one.read("val").tolist() == three.read("val").tolist()
    # Another seed moves documents; one more file moves none of the others.
    assert set(documents(build("4", [a, b], seed=1), "val")) != set(documents(one, "val"))
    (a / "new.txt").write_text("something new\n")
    assert set(documents(build("5", [a, b]), "val")) - {"something new\n"} == set(documents(one, "val"))


def test_docstrings_stay_on_the_side_of_their_code(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [(f"m{number}.py", tmp_path / f"m{number}.py") for number in range(40)]
    for number, (_, path) in enumerate(files):
        path.write_text(f'"""{text(number)}"""\nx = {number}\n', "utf-8")
    monkeypatch.setattr("effkern.data.stdlib.stdlib_files", lambda: files)
    monkeypatch.setattr("effkern.data.stdlib._topics", list)
    dataset = build(sources=["stdlib"])
    sides = {item: split for split in ("train", "val") for item in documents(dataset, split)}
    code, docs = (
        {item.name: sides[item.text] for item in source.read() if isinstance(item, Document)}
        for source in resolve_sources(["stdlib"])
    )
    assert code == docs
    assert len(code) == 40
    assert set(code.values()) == {"train", "val"}


def test_sources_share_the_byte_limit(build: Build, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "few.txt").write_text("a few words\n")
    (tmp_path / "other").mkdir()
    for number in range(100, 140):
        (tmp_path / "other" / f"{number}.txt").write_text(text(number), "utf-8")
    limit = 12_000
    manifest = build(sources=[tmp_path / "few", corpus, tmp_path / "other"], max_bytes=limit).manifest
    few, one, two = (sum(counts.bytes for counts in source.splits.values()) for source in manifest.sources)
    assert few == 12
    # Whole documents of some 600 bytes: each share is filled to less than one of them.
    assert 0 <= (limit - few) // 2 - one < 700
    assert 0 <= limit - few - one - two < 700


def test_native_and_numpy_build_the_same_dataset(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = load("_data")
    if reason:
        pytest.skip(reason)
    compiled = build("compiled")
    monkeypatch.setattr("effkern.data.kernels._native", fallback)
    plain = build("plain")
    assert plain.hash == compiled.hash
    assert plain.read("train").tobytes() == compiled.read("train").tobytes()


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_no_side_stays_empty(build: Build, val_fraction: float) -> None:
    dataset = build(val_fraction=val_fraction)
    assert min(len(documents(dataset, split)) for split in ("train", "val")) == 1


def test_single_file_and_no_validation(build: Build, corpus: Path) -> None:
    single = build("single", [corpus / "t01.md"], val_fraction=0.99)
    assert (single.num_tokens("val"), documents(single, "train")) == (0, [text(1)])
    with pytest.raises(ValueError, match="split 'val' must hold tokens, got 0"):
        single.bytes_per_token("val")
    assert build("none", val_fraction=0).manifest.splits["val"].documents == 0


def test_two_builds_are_the_same_bytes(build: Build, tmp_path: Path) -> None:
    build("one")
    build("two")
    for name in ("manifest.json", "tokenizer.json", "train-00000.bin", "val-00000.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_small_shards_hold_the_same_stream(build: Build, tmp_path: Path) -> None:
    whole, cut = build("whole"), build("cut", shard_tokens=997)
    assert len(cut.manifest.shards) > 4
    assert {shard.tokens for shard in cut.manifest.shards if shard.split == "train"} >= {997}
    np.testing.assert_array_equal(cut.read("train"), whole.read("train"))
    np.testing.assert_array_equal(cut.read("train", 990, 1003), whole.read("train")[990:1003])
    shard = cut.manifest.shards[1]
    assert np.fromfile(cut.path / shard.file, "<u2").tolist() == whole.read("train", 997, 2 * 997).tolist()


def test_shards_widen_with_the_vocabulary(build: Build, corpus: Path) -> None:
    vocabulary = {"<|endoftext|>": 0}
    for top, dtype in [(65535, "uint16"), (65536, "uint32")]:
        words = Tokenizer(models.WordLevel(vocabulary | {"[UNK]": top}, unk_token="[UNK]"))
        dataset = build(str(top), tokenizer=words)
        assert (dataset.vocab_size, dataset.manifest.shards[0].dtype) == (top + 1, dtype)
        assert sorted(set(dataset.read("train").tolist())) == [0, top]


def test_given_tokenizer_is_kept(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    train_tokenizer([text(1)], 280).save(str(path), pretty=False)
    dataset = build(tokenizer=path)
    assert (dataset.path / "tokenizer.json").read_bytes() == path.read_bytes()
    assert dataset.tokenizer().to_str() == path.read_text("utf-8")


def test_skipped_files_are_listed(build: Build, corpus: Path) -> None:
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "empty.txt").write_bytes(b" \n")
    (corpus / "gone.md").symlink_to(corpus / "nowhere")
    (corpus / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    manifest = build().manifest
    assert {(entry.name, entry.reason) for entry in manifest.skipped} == {
        ("latin.txt", "not UTF-8: byte 3"),
        ("empty.txt", "empty"),
        ("gone.md", "unreadable: No such file or directory"),
        ("half.jsonl:1", "not UTF-8: lone surrogate"),
    }
    assert manifest.skipped_reasons == {"not UTF-8": 2, "empty": 1, "unreadable": 1}
    assert manifest.sources[0].skipped == 4


def test_progress_reaches_its_total(build: Build) -> None:
    calls: list[tuple[str, int, int]] = []
    dataset = build(progress=lambda *call: calls.append(call))
    size = sum(counts.bytes for counts in dataset.manifest.splits.values())
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["read", "tokenizer", "encode"]
    assert calls[-1] == ("encode", size, size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction must lie in \[0, 1\), got 1.0"),
        ({"val_fraction": -0.1}, r"val_fraction must lie in \[0, 1\), got -0.1"),
        ({"vocab_size": 200}, r"vocab_size must lie in \[257, 2\*\*32\], got 200"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
        ({"max_bytes": 0}, "max_bytes must be at least 1, got 0"),
        ({"max_bytes": 10}, "sources must hold text, got none in .*, max_bytes=10"),
    ],
)
def test_bad_arguments(build: Build, tmp_path: Path, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)
    assert not (tmp_path / "out").exists()


def test_empty_corpus(build: Build, tmp_path: Path) -> None:
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"sources must hold text, got none in .*blank \(skipped: empty: 1\)"):
        build(sources=[tmp_path / "blank"])
    assert not (tmp_path / "out").exists()
