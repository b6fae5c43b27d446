"""A labeller without a model: labels that are a function of token and position, as a teacher's are."""

import sys
import time
from pathlib import Path

import numpy as np

from effkern.data import PackedDataset
from effkern.data.order import num_windows
from effkern.data.soft_labels_codec import LabelArrays
from effkern.data.soft_labels_spec import LabelSpec
from effkern.data.soft_labels_writer import windows_hash, write_soft_labels

SEQ_LEN = 16


def spec_of(dataset: PackedDataset, windows: np.ndarray, **changes: object) -> LabelSpec:
    fields = {
        "dataset": dataset.hash,
        "tokenizer": dataset.manifest.tokenizer.sha256,
        "teacher": "f" * 64,
        "vocab_size": dataset.vocab_size,
        "split": "train",
        "seq_len": SEQ_LEN,
        "num_windows": len(windows),
        "windows_sha256": windows_hash(windows),
        "method": "sampled",
        "k": 0,
        "draws": 12,
        "temperature": 1.0,
        "seed": 0,
        "precision": "float32",
        "shard_windows": 11,
    }
    return LabelSpec(**fields | changes)


def all_windows(dataset: PackedDataset) -> np.ndarray:
    return np.arange(num_windows(dataset, "train", SEQ_LEN), dtype=np.int64)


class Labeller:
    """1 to 12 ids a token, a function of (token, position); counts the calls."""

    def __init__(self, vocab: int, draws: int = 12) -> None:
        self.vocab, self.draws, self.calls = vocab, draws, 0

    def __call__(self, tokens: np.ndarray, positions: np.ndarray) -> LabelArrays:
        self.calls += 1
        assert tokens.shape == positions.shape
        j = np.arange(self.draws)
        drawn = (tokens.ravel()[:, None] * 31 + (positions.ravel()[:, None] + 1) * (7 * j * j + 3 * j)) % 40
        counts = (drawn[:, :, None] == np.arange(40)).sum(axis=1)
        ids = np.argsort(counts == 0, axis=1, kind="stable")[:, : self.draws].astype(np.int32)
        found = np.take_along_axis(counts, ids, 1)
        with np.errstate(divide="ignore"):
            logprobs = np.log(found / self.draws).astype(np.float32)
        lse = (tokens.ravel() % 17).astype(np.float32)
        return LabelArrays(np.where(found > 0, ids, -1), logprobs, np.full(len(ids), 0.25, np.float32), lse)


def main() -> None:
    """Write a cache slowly: what the crash test kills."""
    dataset = PackedDataset(sys.argv[1])
    windows = all_windows(dataset)
    label = Labeller(dataset.vocab_size)

    def slow(tokens: np.ndarray, positions: np.ndarray) -> LabelArrays:
        time.sleep(0.002)
        return label(tokens, positions)

    write_soft_labels(Path(sys.argv[2]), dataset, spec_of(dataset, windows), windows, slow, batch_windows=2)


if __name__ == "__main__":
    main()
