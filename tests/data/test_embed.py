"""Pools of windows and their embeddings by a model."""

import numpy as np
import pytest
import torch

from effkern.data import build_dataset
from effkern.data.curation import Embedder, Pool, fit_projection
from effkern.data.curation.pool import check_inputs
from effkern.models import Decoder, DecoderConfig
from tests.data.conftest import text


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Pool:
    """Two sources with one tokenizer, windows of 16 tokens."""
    root = tmp_path_factory.mktemp("pool")
    for name, numbers in (("a", range(12)), ("b", range(50, 58))):
        (root / name).mkdir()
        for number in numbers:
            (root / name / f"{number}.txt").write_text(text(number, 4))
    first = build_dataset(root / "A", [root / "a"], vocab_size=300, val_fraction=0)
    build_dataset(root / "B", [root / "b"], tokenizer=first.path / "tokenizer.json", val_fraction=0)
    return Pool([root / "A", root / "B"], 16)


@pytest.fixture(scope="module")
def model(pool) -> Decoder:
    config = DecoderConfig(
        vocab_size=300, hidden_size=24, num_layers=2, num_heads=2, num_kv_heads=1, mlp_size=32, max_seq_len=16
    )
    found = Decoder(config, seed=1).eval().requires_grad_(False)
    found.norm.weight.uniform_(0.5, 1.5)
    return found


def test_examples_are_the_windows_of_training(pool):
    sizes = [(d.num_tokens("train") - 1) // 16 for d in pool.datasets]
    assert len(pool) == sum(sizes)
    examples = np.array([0, sizes[0] - 1, sizes[0], len(pool) - 1, 1])
    assert pool.source(examples).tolist() == [0, 0, 1, 1, 0]
    rows = pool.tokens(examples, 1)
    for row, (dataset, window) in zip(rows, [(0, 0), (0, sizes[0] - 1), (1, 0), (1, sizes[1] - 1), (0, 1)]):
        np.testing.assert_array_equal(row, pool.datasets[dataset].read("train", window * 16, window * 16 + 17))
    for wrong in (-1, len(pool)):
        with pytest.raises(ValueError, match=rf"examples must lie in \[0, {len(pool)}\), got {wrong}"):
            pool.tokens(np.array([wrong]))


def test_pools_that_cannot_be(pool, tmp_path):
    path = pool.datasets[0].path
    with pytest.raises(ValueError, match="data must name at least one packed dataset"):
        Pool([], 16)
    with pytest.raises(ValueError, match="split 'val' must hold a window of 16"):
        Pool([path], 16, "val")
    (tmp_path / "t.txt").write_text(text(99))
    build_dataset(tmp_path / "C", [tmp_path / "t.txt"], vocab_size=257, val_fraction=0)
    with pytest.raises(ValueError, match="datasets must have the tokenizer of"):
        Pool([path, tmp_path / "C"], 16)
    with pytest.raises(ValueError, match="select: must be made from the same datasets"):
        check_inputs("select", pool, Pool([path], 16).inputs)
    check_inputs("select", pool, {**pool.inputs, "model": "x"})


@pytest.mark.parametrize("kind", ["token", "output"])
def test_means_leave_out_the_end_of_text(pool, model, kind):
    """Against the rows one by one; some windows hold an end of text."""
    examples = np.arange(len(pool))
    tokens = torch.from_numpy(pool.tokens(examples))
    assert (tokens == pool.eos_id).any()
    with torch.no_grad():
        rows = model.embedding.weight[tokens] if kind == "token" else model(tokens)
    truth = torch.stack([row[ids != pool.eos_id].mean(0) for row, ids in zip(rows.double(), tokens)])
    found = Embedder(model, pool, kind).raw(examples)
    np.testing.assert_allclose(found, truth.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["token", "output"])
def test_projected_is_the_projection_of_the_means(pool, model, kind):
    examples = np.arange(len(pool))
    embedder = Embedder(model, pool, kind)
    raw = embedder.raw(examples)
    projection = fit_projection(raw, 8)
    found = embedder.projected(examples, projection)
    np.testing.assert_allclose(found, projection(raw), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_errors(pool, model):
    with pytest.raises(ValueError, match="kind must be one of token, output, got 'bert'"):
        Embedder(model, pool, "bert")
    with pytest.raises(ValueError, match="seq_len must be at most 16, got 32"):
        Embedder(model, Pool([pool.datasets[0].path], 32), "output")
