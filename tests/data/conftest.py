"""A small corpus of files, and builds of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effkern.data import PackedDataset, build_dataset

SENTENCE = "the loss of a small student falls when its teacher is right more often than it is wrong"
WORDS = SENTENCE.split()


def text(number: int, lines: int = 12) -> str:
    """Prose of its own for each number, with characters of one to four bytes."""
    rows = [" ".join(WORDS[(number * 7 + line * 3 + k * k) % len(WORDS)] for k in range(9)) for line in range(lines)]
    return f"Text {number} \u00e9 \u4e2d \U0001f40d\n" + "\n".join(rows) + "\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty text files, all different, some in a folder below."""
    root = tmp_path / "corpus"
    (root / "deep" / "er").mkdir(parents=True)
    for number in range(40):
        folder = root / "deep" / "er" if number % 4 == 0 else root
        (folder / f"t{number:02d}.{('txt', 'md', 'py')[number % 3]}").write_text(text(number), "utf-8")
    return root


@pytest.fixture
def build(tmp_path: Path, corpus: Path) -> Callable[..., PackedDataset]:
    """`build_dataset` with small defaults."""

    def run(out: str = "out", sources: Any = None, **settings: Any) -> PackedDataset:
        settings = {"vocab_size": 300, "val_fraction": 0.2} | settings
        return build_dataset(tmp_path / out, [corpus] if sources is None else sources, **settings)

    return run


def documents(dataset: PackedDataset, split: str) -> list[str]:
    """The texts of a split, decoded from its tokens."""
    tokenizer = dataset.tokenizer()
    texts, ids = [], []
    for token in dataset.read(split).tolist():
        if token == dataset.eos_id:
            texts.append(tokenizer.decode(ids, skip_special_tokens=False))
            ids = []
        else:
            ids.append(token)
    assert ids == []
    return texts
