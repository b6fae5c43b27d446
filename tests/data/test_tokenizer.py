"""The tokenizer: exact round trip, determinism, pieces, special tokens in the text, tokenizers of others."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from effkern.data.tokenizer import cut_pieces, encode_documents, load_encoder, train_tokenizer
from tests.data.conftest import text

TEXTS = [text(number) for number in range(30)]
NASTY = "\x00\x7f \t\r\n\u00e9e\u0301\ufeff\U0001f40d<|endoftext|>\n\n  indented\n\ttab   trailing   "


def test_round_trip_of_anything() -> None:
    encoder = load_encoder(train_tokenizer(TEXTS, 320))
    assert encoder.vocab_size == 320
    assert (encoder.eos_token, encoder.eos_id) == ("<|endoftext|>", 0)
    for sample in [NASTY, *TEXTS]:
        (ids,) = encoder.encode([sample])
        # The name of a special token inside a text is text.
        assert 0 not in ids
        assert encoder.tokenizer.decode(ids, skip_special_tokens=False) == sample


def test_training_is_deterministic() -> None:
    files = {load_encoder(train_tokenizer(iter(TEXTS), 400)).file for _ in range(3)}
    assert len(files) == 1


def test_merges_shorten_the_text() -> None:
    plain, merged = (load_encoder(train_tokenizer(TEXTS, size)) for size in (257, 600))
    joined = "".join(TEXTS)
    assert len(plain.encode([joined])[0]) == len(joined.encode())
    assert len(merged.encode([joined])[0]) < len(joined) / 2.5


@pytest.mark.parametrize("size", [256, 0, 2**32 + 1])
def test_vocab_size_range(size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size must lie in \[257, 2\*\*32\], got {size}"):
        train_tokenizer(TEXTS, size)


@pytest.mark.parametrize("limit", [60, 101, 1000])
def test_pieces_encode_as_the_whole(limit: int) -> None:
    encoder = load_encoder(train_tokenizer(TEXTS, 400))
    blocks = "def f(x):\n    return x\n\n\n  \t\nclass A:\r\n\r\n    pass \r\n"
    whole = blocks * 20 + "".join(TEXTS) + blocks * 5 + "\n"
    pieces = list(cut_pieces(whole, limit))
    assert "".join(pieces) == whole
    assert max(map(len, pieces)) <= limit
    assert [token for ids in encoder.encode(pieces) for token in ids] == encoder.encode([whole])[0]


def test_pieces_of_text_without_lines() -> None:
    assert list(cut_pieces("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]
    assert list(cut_pieces("\n" * 25, 10)) == ["\n" * 10, "\n" * 10, "\n" * 5]
    assert list(cut_pieces("ab\n\ncd\n", 4)) == ["ab", "\n\ncd", "\n"]
    assert list(cut_pieces("", 10)) == []


@pytest.mark.parametrize("chunk_chars", [1, 500, 10**9])
def test_every_document_ends_once(chunk_chars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_pieces, "__defaults__", (150,))
    encoder = load_encoder(train_tokenizer(TEXTS, 400))
    streams: dict[int, list[int]] = {}
    for pieces, owners in encode_documents(encoder, enumerate(TEXTS), chunk_chars):
        for piece, owner in zip(pieces, owners, strict=True):
            streams.setdefault(owner, []).extend(piece)
    assert list(streams) == list(range(len(TEXTS)))
    for number, ids in streams.items():
        assert ids == [*encoder.encode([TEXTS[number]])[0], encoder.eos_id]


def test_tokenizer_of_another_keeps_its_file_and_loses_padding(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 400)
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(5)
    path = tmp_path / "other.json"
    tokenizer.save(str(path))
    encoder = load_encoder(path)
    assert encoder.file == path.read_bytes()
    short, long = encoder.encode(["a", TEXTS[0]])
    assert len(short) == 1
    assert encoder.tokenizer.decode(long) == TEXTS[0]
    # The object that was passed is left as it is.
    load_encoder(tokenizer)
    assert len(tokenizer.encode(TEXTS[0]).ids) == 64


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: must be a tokenizer\.json, got "):
        load_encoder(path)
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"tokenizer must have one of the tokens <\|endoftext\|> "):
        load_encoder(words)
    with pytest.raises(TypeError, match=r"must be a path or a tokenizers\.Tokenizer, got int"):
        load_encoder(3)  # type: ignore[arg-type]


def test_gaps_in_the_ids_count() -> None:
    gaps = Tokenizer(models.WordLevel({"a": 0, "</s>": 70000}, unk_token="a"))
    encoder = load_encoder(gaps)
    assert (encoder.vocab_size, encoder.eos_id, encoder.eos_token) == (70001, 70000, "</s>")
