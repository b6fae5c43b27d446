"""`build_dataset`: from named sources to a packed dataset on disk."""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from effkern.data.collect import Progress, collect
from effkern.data.dataset import PackedDataset
from effkern.data.fallback import token_dtype
from effkern.data.folder import BuildFolder, build_folder
from effkern.data.kernels import pack_tokens
from effkern.data.manifest import Counts, Manifest, ShardInfo, SourceInfo, TokenizerInfo
from effkern.data.shards import DEFAULT_SHARD_TOKENS, ShardWriter
from effkern.data.sources import Source, resolve_sources
from effkern.data.spool import DocumentSpool, Losses

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from effkern.data.tokenizer import TextEncoder

# A larger sample moves few of the merges and costs as much again.
TOKENIZER_SAMPLE_CHARS = 16 << 20
# Encoding takes about 60 bytes of memory a character while it runs.
CHUNK_CHARS = min(max(2, os.cpu_count() or 1), 16) << 20


def build_dataset(
    out: str | Path,
    sources: Sequence[str | Path] = ("stdlib",),
    *,
    vocab_size: int = 4096,
    tokenizer: "Tokenizer | str | Path | None" = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    max_bytes: int | None = None,
    text_field: str = "text",
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackedDataset:
    """Build a token dataset in the folder `out`: shards, tokenizer.json and, last, manifest.json.

    Exact duplicates are dropped. Train and val are split by file (jsonl and `datasets`: by record), by a hash of
    the file's content and the seed. Documents lie in an order drawn from their content and the seed, each followed
    by the end-of-text token. So the same texts give the same bytes, whatever the file names, the order of the
    sources and the number of threads (under `max_bytes` names and order decide which texts are taken).

    Args:
        out: folder to create; an unfinished build in it is replaced.
        sources: "stdlib", "stdlib-code", "stdlib-docs", "hf:NAME[:CONFIG[:SPLIT]]", files, folders, globs.
        vocab_size: of the byte-level BPE that is trained on the train split (at most 16 Mi characters of it), >= 257.
        tokenizer: a `tokenizers.Tokenizer` or the path of a tokenizer.json, used instead of training one.
        val_fraction: share of the files that goes to val, in [0, 1). Where there are two or more, at least one goes
            to each side; a single one is train.
        seed: of split and order.
        max_bytes: limit on the UTF-8 bytes of text, shared evenly by the sources; documents are never cut.
        text_field: field of a record that holds its text.
        shard_tokens: tokens a shard file.
        overwrite: replace a finished dataset in `out`; it stays whole until the new one is.
        progress: called with (stage, done, total): "read" in bytes (total 0 if unknown), "tokenizer" 0 and 1 of 1,
            "encode" in bytes.

    Returns:
        The dataset, opened.

    Raises:
        ValueError: an argument is out of range, a source does not exist, a jsonl line does not parse (file and line
            are named), or no text was found.
        FileExistsError: `out` holds a finished dataset and `overwrite` is False, or files of another kind.
        InUse: another build is writing to `out` (a RuntimeError).
        ImportError: tokenizers, or what a source needs, is not installed.

    Memory: the longest document, some 60 bytes a character of a chunk of a few MiB, and 150 bytes a document; the
    texts pass through a temporary file in `out`. Files that cannot be read or are not UTF-8 are skipped and listed
    in the manifest.
    """
    from effkern.data.tokenizer import check_vocab_size, load_encoder

    if not 0 <= val_fraction < 1:
        raise ValueError(f"build_dataset: val_fraction must lie in [0, 1), got {val_fraction}")
    if shard_tokens < 1:
        raise ValueError(f"build_dataset: shard_tokens must be at least 1, got {shard_tokens}")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"build_dataset: max_bytes must be at least 1, got {max_bytes}")
    encoder = None
    if tokenizer is None:
        check_vocab_size(vocab_size)
    else:
        encoder = load_encoder(tokenizer)
    found = resolve_sources(sources, text_field)
    report = progress or (lambda stage, done, total: None)

    with (
        build_folder(Path(out), overwrite) as folder,
        DocumentSpool(folder.temporary("documents"), seed) as spool,
    ):
        losses = collect(found, spool, max_bytes, report)
        if not len(spool):
            names = ", ".join(source.name for source in found)
            why = "; ".join(f"{reason}: {count}" for reason, count in losses.reasons.most_common(3))
            limit = f", max_bytes={max_bytes}" if max_bytes is not None else ""
            raise ValueError(f"build_dataset: sources must hold text, got none in {names}{limit} (skipped: {why or 0})")
        build = _Build(folder, spool, found, report)
        splits = spool.split(val_fraction)
        if encoder is None:
            encoder = build.train(splits["train"].tolist(), vocab_size)
        name = folder.free_name("tokenizer.json")
        folder.write(name, encoder.file)
        info = TokenizerInfo(name, encoder.sha256, encoder.vocab_size, encoder.eos_token, encoder.eos_id)
        for split, numbers in splits.items():
            build.encode(split, numbers.tolist(), encoder, shard_tokens)
        settings = {"val_fraction": val_fraction, "seed": seed, "max_bytes": max_bytes, "text_field": text_field}
        folder.finish(build.manifest(info, losses, settings))
    return PackedDataset(out)


class _Build:
    """Counts what goes where while the documents of a spool are turned into shards."""

    def __init__(self, folder: BuildFolder, spool: DocumentSpool, sources: Sequence[Source], report: Progress) -> None:
        self._folder = folder
        self._spool = spool
        self._sources = sources
        self._report = report
        self._shards: list[ShardInfo] = []
        self._counts: dict[str, list[Counts]] = {}
        self._done = 0

    def train(self, numbers: Sequence[int], vocab_size: int) -> "TextEncoder":
        from effkern.data.tokenizer import load_encoder, train_tokenizer

        self._report("tokenizer", 0, 1)
        encoder = load_encoder(train_tokenizer(self._sample(numbers), vocab_size))
        self._report("tokenizer", 1, 1)
        return encoder

    def _sample(self, numbers: Sequence[int]) -> Iterator[str]:
        left = TOKENIZER_SAMPLE_CHARS
        for number in numbers:
            text = self._spool.text(number)[:left]
            yield text
            left -= len(text)
            if left == 0:
                return

    def encode(self, split: str, numbers: Sequence[int], encoder: "TextEncoder", shard_tokens: int) -> None:
        from effkern.data.tokenizer import encode_documents

        counts = self._counts[split] = [Counts() for _ in self._sources]
        for number in numbers:
            entry = counts[self._spool.source(number)]
            entry.documents += 1
            entry.bytes += self._spool.size(number)
        texts = ((number, self._spool.text(number)) for number in numbers)
        with ShardWriter(self._folder, split, token_dtype(encoder.vocab_size), shard_tokens) as writer:
            for pieces, owners in encode_documents(encoder, texts, CHUNK_CHARS):
                writer.write(pack_tokens(pieces, encoder.vocab_size))
                for piece, owner in zip(pieces, owners):
                    counts[self._spool.source(owner)].tokens += len(piece)
                whole = [owner for piece, owner in zip(pieces, owners) if piece and piece[-1] == encoder.eos_id]
                self._done += sum(map(self._spool.size, whole))
                self._report("encode", self._done, self._spool.num_bytes)
        self._shards += writer.shards

    def manifest(self, tokenizer: TokenizerInfo, losses: Losses, settings: Mapping[str, object]) -> Manifest:
        from tokenizers import __version__ as tokenizers_version

        from effkern import __version__

        sources = [
            SourceInfo(
                source.name,
                {split: counts[index] for split, counts in self._counts.items()},
                losses.duplicates[index],
                losses.skipped[index],
            )
            for index, source in enumerate(self._sources)
        ]
        versions = {"effkern": __version__, "tokenizers": tokenizers_version, "python": platform.python_version()}
        return Manifest(
            tokenizer,
            {split: _total(counts) for split, counts in self._counts.items()},
            self._shards,
            sources,
            losses.duplicates.total(),
            dict(losses.reasons),
            losses.listed,
            dict(settings),
            versions,
        )


def _total(counts: Sequence[Counts]) -> Counts:
    return Counts(sum(c.documents for c in counts), sum(c.tokens for c in counts), sum(c.bytes for c in counts))
