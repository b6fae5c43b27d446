"""Byte-level BPE: training, loading, encoding. The one file that imports `tokenizers`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# Names of the same thing in tokenizers that others trained.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
# Below it not even the 256 bytes and the end of text fit.
MIN_VOCAB = 257
# Long documents are encoded in pieces, which bounds memory and keeps every core busy.
PIECE_CHARS = 1 << 16


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer together with the bytes of its file, ready to encode plain text losslessly and without padding."""

    tokenizer: Tokenizer
    file: bytes
    vocab_size: int
    eos_token: str
    eos_id: int

    @property
    def sha256(self) -> str:
        return sha256(self.file).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; a special token spelled out in a text is encoded as the plain text it is."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE without normalisation: decoding gives back every text exactly.

    Args:
        texts: the sample; the result depends on its texts alone, not on the number of threads.
        vocab_size: at least 257 (the bytes and <|endoftext|>, which is id 0). A small sample may give fewer.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def check_vocab_size(vocab_size: int) -> None:
    if not MIN_VOCAB <= vocab_size <= 1 << 32:
        raise ValueError(f"build_dataset: vocab_size must lie in [{MIN_VOCAB}, 2**32], got {vocab_size}")


def load_encoder(tokenizer: Tokenizer | str | Path) -> TextEncoder:
    """Make an encoder of a tokenizer or of its tokenizer.json, which it leaves as it is.

    Raises:
        ValueError: the file does not parse, or there is no end-of-text token.
        TypeError: neither a path nor a `tokenizers.Tokenizer`.
    """
    if isinstance(tokenizer, Tokenizer):
        file = tokenizer.to_str(pretty=True).encode()
    elif isinstance(tokenizer, (str, Path)):
        file = Path(tokenizer).read_bytes()
    else:
        kind = type(tokenizer).__name__
        raise TypeError(f"load_encoder: tokenizer must be a path or a tokenizers.Tokenizer, got {kind}")
    parsed = parse_tokenizer(file, str(tokenizer) if isinstance(tokenizer, (str, Path)) else "tokenizer")
    vocab = parsed.get_vocab(with_added_tokens=True)
    eos_token = next((name for name in END_OF_TEXT_NAMES if name in vocab), None)
    if eos_token is None:
        raise ValueError(f"load_encoder: tokenizer must have one of the tokens {' '.join(END_OF_TEXT_NAMES)}, got none")
    parsed.no_padding()
    parsed.no_truncation()
    parsed.encode_special_tokens = True
    # Ids may have gaps, so the largest one counts.
    return TextEncoder(parsed, file, max(vocab.values()) + 1, eos_token, vocab[eos_token])


def parse_tokenizer(file: bytes, name: str) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(file)
    except Exception as error:
        # tokenizers raises plain Exception here.
        raise ValueError(f"{name}: must be a tokenizer.json, got {error}") from None


def cut_pieces(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters, before the white space around a line end.

    Byte-level BPE never merges across the place where white space begins, so the pieces encode to the ids of the
    whole. A stretch of `limit` characters without such a place is cut anywhere; decoding is exact even then.
    """
    start = 0
    while len(text) - start > limit:
        line_end = max(start, text.rfind("\n", start, start + limit))
        stop = start + (len(text[start:line_end].rstrip()) or limit)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def encode_documents(
    encoder: TextEncoder, documents: Iterable[tuple[int, str]], chunk_chars: int
) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Encode (number, text) pairs, some `chunk_chars` characters at a time.

    Returns:
        Pairs (pieces, numbers): token lists in order, and the number of the document each belongs to. The last
        piece of a document ends with the end-of-text token.
    """
    batch: list[tuple[int, str, bool]] = []
    waiting = 0
    for entry in _pieces(documents):
        batch.append(entry)
        waiting += len(entry[1])
        if waiting >= chunk_chars:
            yield _encode(encoder, batch)
            batch, waiting = [], 0
    if batch:
        yield _encode(encoder, batch)


def _pieces(documents: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str, bool]]:
    for number, text in documents:
        done = 0
        for piece in cut_pieces(text):
            done += len(piece)
            yield number, piece, done == len(text)


def _encode(encoder: TextEncoder, batch: list[tuple[int, str, bool]]) -> tuple[list[list[int]], list[int]]:
    pieces = encoder.encode([piece for _, piece, _ in batch])
    for ids, (_, _, last) in zip(pieces, batch):
        if last:
            ids.append(encoder.eos_id)
    return pieces, [number for number, _, _ in batch]
