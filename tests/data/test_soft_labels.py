"""The soft-label cache: what is written is read, by window and in any order; what does not fit is refused."""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from effkern.data import BatchOrder, PackedDataset
from effkern.data.soft_labels import SoftLabelCache
from effkern.data.soft_labels_shard import shard_name
from effkern.data.soft_labels_spec import FORMAT_VERSION, load_labels
from effkern.data.soft_labels_writer import write_soft_labels
from tests.data.soft_label_fixtures import SEQ_LEN, Labeller, all_windows, spec_of


@pytest.fixture
def dataset(build) -> PackedDataset:
    return build()


@pytest.fixture
def cache(dataset, tmp_path) -> SoftLabelCache:
    """All windows, in shards of 11."""
    return make(dataset, tmp_path / "cache")


def make(dataset, out: Path, windows=None, label=None, **changes) -> SoftLabelCache:
    windows = all_windows(dataset) if windows is None else windows
    spec = spec_of(dataset, windows, **changes)
    write_soft_labels(out, dataset, spec, windows, label or Labeller(dataset.vocab_size), batch_windows=4)
    return SoftLabelCache(out)


def expected(dataset, windows):
    """What the labeller says of `windows`, straight."""
    starts = windows * SEQ_LEN
    tokens = dataset.windows("train", starts, SEQ_LEN)
    return Labeller(dataset.vocab_size)(tokens, starts[:, None] + np.arange(SEQ_LEN))


def assert_labels(got, truth):
    slots = got.ids.shape[1]
    assert (truth.ids[:, slots:] == -1).all()
    np.testing.assert_array_equal(got.ids, truth.ids[:, :slots])
    np.testing.assert_array_equal(got.logprobs, truth.logprobs[:, :slots])
    np.testing.assert_array_equal(got.lse, truth.lse)
    np.testing.assert_allclose(got.tail, truth.tail, rtol=2.5e-4)


def test_what_is_written_is_read(dataset, cache):
    assert cache.spec.num_shards > 3
    assert cache.spec.num_windows % 11
    rng = np.random.default_rng(0)
    for size in (1, 7, 64):
        windows = rng.integers(0, cache.spec.num_windows, size)
        assert_labels(cache.read(windows), expected(dataset, windows))
    last = np.array([cache.spec.num_windows - 1, 0])
    assert_labels(cache.read(last, slots=12), expected(dataset, last))
    with pytest.raises(ValueError, match="counts must be at most slots=1"):
        cache.read(last, slots=1)


def test_size_is_what_the_format_says(dataset, cache):
    files = sorted(cache.path.glob("labels-*.bin"))
    assert [file.name for file in files] == [shard_name(i) for i in range(cache.spec.num_shards)]
    entries = int((expected(dataset, all_windows(dataset)).ids >= 0).sum())
    assert cache.manifest.entries == entries
    tokens = cache.spec.num_tokens
    # 3 bytes an entry, 5 a token, 8 a window for its offset and 8 for its number; a shard has its header and padding.
    exact = 3 * entries + 5 * tokens + 16 * cache.spec.num_windows
    assert exact <= cache.manifest.bytes <= exact + cache.spec.num_shards * (64 + 8 + 16)
    assert sum(file.stat().st_size for file in files) + 8 * cache.spec.num_windows == cache.manifest.bytes


def test_windows_of_some_steps(dataset, tmp_path):
    """The cache of a run's first steps serves these steps of that run, and says what it lacks of the others."""
    order = BatchOrder(dataset, seq_len=SEQ_LEN, batch_size=6, seed=4)
    windows = np.concatenate([order.indices(step) for step in range(3)])
    cache = make(dataset, tmp_path / "part", windows)
    for step in range(3):
        assert cache.missing(order.indices(step)).size == 0
        assert_labels(cache.read(order.indices(step)), expected(dataset, order.indices(step)))
    absent = order.indices(3)
    assert cache.missing(absent).tolist() == absent.tolist()
    with pytest.raises(ValueError, match=f"windows must have labels, got {absent[0]} without"):
        cache.read(np.concatenate([windows[:2], absent]))
    with pytest.raises(ValueError, match="at least one number"):
        cache.read(windows[:0])


def test_bytes_do_not_depend_on_batches_or_interruptions(dataset, cache, tmp_path):
    windows = all_windows(dataset)
    spec = spec_of(dataset, windows)
    label = Labeller(dataset.vocab_size)
    out = tmp_path / "again"
    rng = random.Random(3)
    interruptions = -1
    result = None
    while result is None or result.manifest is None:
        left = rng.randrange(1, 9)
        interruptions += 1

        def stop() -> bool:
            nonlocal left
            left -= 1
            return left < 0

        result = write_soft_labels(out, dataset, spec, windows, label, batch_windows=3, stop=stop)
        assert not list(out.glob(".tmp-*"))
        assert interruptions < 100
    assert interruptions > 5
    assert result.kept > 0
    assert same_files(out, cache.path)
    # A finished cache is hashed and left alone.
    before = label.calls
    result = write_soft_labels(out, dataset, spec, windows, label)
    assert (label.calls, result.kept, result.windows) == (before, spec.num_shards, 0)


def same_files(a: Path, b: Path) -> bool:
    names = {name for path in (a, b) for name in os.listdir(path) if not name.startswith(".")}
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_failing_labeller_leaves_whole_shards_alone(dataset, cache, tmp_path, error):
    windows = all_windows(dataset)
    label = Labeller(dataset.vocab_size)

    def fails(tokens, positions):
        if label.calls == 7:
            raise error
        return label(tokens, positions)

    out = tmp_path / "failed"
    with pytest.raises(type(error)):
        make(dataset, out, windows, fails)
    assert sorted(p.name for p in out.glob("*labels*")) == [shard_name(0), shard_name(1)]
    with pytest.raises(
        FileNotFoundError, match=r"an unfinished cache .run the command that makes it again: it goes on"
    ):
        SoftLabelCache(out)
    make(dataset, out)
    assert same_files(out, cache.path)


def test_labels_that_are_not_finite_are_named(dataset, tmp_path):
    def poisoned(tokens, positions):
        labels = Labeller(dataset.vocab_size)(tokens, positions)
        labels.lse[3] = np.nan
        return labels

    with pytest.raises(ValueError, match=r"soft labels: windows 0 ... 3: Codec: lse and tail must be finite, got nan"):
        make(dataset, tmp_path / "poisoned", label=poisoned)


def test_damage_is_found_and_named(dataset, cache, tmp_path):
    shard = cache.path / shard_name(1)
    content = shard.read_bytes()
    rng = random.Random(0)
    for place in [0, 9, 13, 17, 26, 40, 63, 64, len(content) - 1, *(rng.randrange(len(content)) for _ in range(20))]:
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"labels-00001\.bin"):
            SoftLabelCache(cache.path)
    for cut in (0, 10, 64, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"must have .* bytes, got .*labels-00001\.bin"):
            SoftLabelCache(cache.path)
    shard.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"labels-00001\.bin"):
        SoftLabelCache(cache.path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard is missing: .*labels-00001\.bin"):
        SoftLabelCache(cache.path)
    shutil.copy(cache.path / shard_name(0), shard)
    with pytest.raises(ValueError, match=r"shard must be number 1 .*labels-00001\.bin"):
        SoftLabelCache(cache.path)
    shard.write_bytes(content)
    windows = np.fromfile(cache.path / "windows.bin", "<i8")
    windows[:2] = windows[1::-1]
    windows.tofile(cache.path / "windows.bin")
    with pytest.raises(ValueError, match=r"changed after it was written: .*windows\.bin"):
        SoftLabelCache(cache.path)


@pytest.mark.parametrize("name", [shard_name(1), "spec.json"])
def test_damage_is_repaired_on_request(dataset, cache, name):
    windows, label = all_windows(dataset), Labeller(dataset.vocab_size)
    whole = (cache.path / shard_name(1)).read_bytes()
    (cache.path / name).write_bytes(b"not what it was")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        write_soft_labels(cache.path, dataset, cache.spec, windows, label, batch_windows=4)
    assert label.calls == 0
    write_soft_labels(cache.path, dataset, cache.spec, windows, label, batch_windows=4, overwrite=True)
    assert (cache.path / shard_name(1)).read_bytes() == whole
    assert SoftLabelCache(cache.path, verify=True).hash == cache.hash


def test_a_shard_of_another_cache_is_none_of_this(dataset, cache, tmp_path):
    other = make(dataset, tmp_path / "other", seed=1)
    shutil.copy(other.path / shard_name(0), cache.path / shard_name(0))
    with pytest.raises(ValueError, match=r"labels-00000\.bin"):
        SoftLabelCache(cache.path)
    # Nor does the writer go on behind it.
    (cache.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"its hash does not match.*labels-00000\.bin"):
        make(dataset, cache.path)


def test_manifest_damage_and_versions(dataset, cache):
    file = cache.path / "manifest.json"
    content = json.loads(file.read_text())
    assert content["format_version"] == FORMAT_VERSION
    cases = [
        ({**content, "format_version": 2}, "format_version must be 1, got 2; make the cache again"),
        ({**content, "format": "effkern-tokens"}, "must be a file of format 'effkern-soft-labels'"),
        ({**content, "spec": {**content["spec"], "temperature": 2.0}}, "was changed after it was written"),
        ({**content, "shards": content["shards"][:-1]}, "was changed after it was written"),
        ({key: value for key, value in content.items() if key != "spec"}, "a field is missing or malformed"),
    ]
    for changed, message in cases:
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load_labels(cache.path)
    file.write_text(json.dumps(content)[:-20])
    with pytest.raises(ValueError, match="not valid JSON"):
        load_labels(cache.path)
    with pytest.raises(FileNotFoundError, match="got no such folder"):
        load_labels(cache.path / "nowhere")


def test_other_tokenizer_dataset_or_packing_is_refused(dataset, cache, build, corpus):
    cache.check(dataset, seq_len=SEQ_LEN)
    for changes, names in (
        ({"seq_len": 8}, ["packing (seq_len): 16 in the cache, 8 asked for"]),
        ({"split": "val"}, ["packing (split): train in the cache, val asked for"]),
        ({"seq_len": 8, "split": "val"}, ["packing (seq_len)", "packing (split)"]),
    ):
        with pytest.raises(ValueError, match="must be used with what they were made from") as caught:
            cache.check(dataset, **{"seq_len": SEQ_LEN} | changes)
        assert all(name in str(caught.value) for name in names)
        assert "tokenizer (hash)" not in str(caught.value)
    reordered = build("reordered", seed=1, tokenizer=dataset.path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"dataset \(hash of its shards\): [0-9a-f]{12} in the cache") as caught:
        cache.check(reordered, seq_len=SEQ_LEN)
    assert "tokenizer (hash)" not in str(caught.value)
    other = build("other", vocab_size=310)
    with pytest.raises(ValueError, match=r"tokenizer \(hash\)"):
        cache.check(other, seq_len=SEQ_LEN)


def test_another_spec_is_refused_and_overwritten_on_request(dataset, cache):
    windows = all_windows(dataset)
    label = Labeller(dataset.vocab_size)
    spec = replace(cache.spec, temperature=0.5, draws=12, seed=3)
    with pytest.raises(ValueError, match="unless overwrite is set") as caught:
        write_soft_labels(cache.path, dataset, spec, windows, label)
    assert "temperature: 1.0 in the cache, 0.5 asked for" in str(caught.value)
    assert "seed: 0 in the cache, 3 asked for" in str(caught.value)
    assert "draws" not in str(caught.value)
    assert label.calls == 0
    assert SoftLabelCache(cache.path, verify=True).hash == cache.hash
    write_soft_labels(cache.path, dataset, spec, windows, label, overwrite=True)
    assert SoftLabelCache(cache.path).spec == spec


def test_other_files_and_other_writers_are_respected(dataset, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="out must be empty or hold a soft-label cache"):
        make(dataset, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "x"
    with pytest.raises(FileExistsError, match="out must be a folder"):
        make(dataset, tmp_path / "full" / "thesis.txt")

    def second(tokens, positions):
        with pytest.raises(RuntimeError, match="another process is writing to"):
            make(dataset, tmp_path / "cache")
        return Labeller(dataset.vocab_size)(tokens, positions)

    make(dataset, tmp_path / "cache", label=second)


def test_hashing_is_remembered(dataset, cache, monkeypatch):
    from effkern.data import soft_labels

    for file in cache.path.glob("labels-*.bin"):
        os.utime(file, (1e9, 1e9))
    hashed = []
    real = soft_labels.check_content
    monkeypatch.setattr(soft_labels, "check_content", lambda file, *rest: hashed.append(file.name) or real(file, *rest))
    SoftLabelCache(cache.path)
    assert len(hashed) == cache.spec.num_shards
    SoftLabelCache(cache.path)
    assert len(hashed) == cache.spec.num_shards
    os.utime(cache.path / shard_name(2), (2e9 / 2 + 5, 1e9 + 5))
    SoftLabelCache(cache.path)
    assert hashed[-1] == shard_name(2)
    assert len(hashed) == cache.spec.num_shards + 1
    SoftLabelCache(cache.path, verify=True)
    assert len(hashed) == 2 * cache.spec.num_shards + 1
