"""Mixing weights, and a packed dataset made of chosen windows."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effkern.data.curation.passes import Progress
from effkern.data.curation.pool import Pool
from effkern.data.dataset import PackedDataset
from effkern.data.fallback import token_dtype
from effkern.data.folder import build_folder
from effkern.data.manifest import Counts, Manifest, SourceInfo, TokenizerInfo
from effkern.data.order import permute
from effkern.data.shards import DEFAULT_SHARD_TOKENS, ShardWriter

BATCH = 1024


def mixture(
    sizes: Sequence[int],
    windows: int,
    *,
    weights: Sequence[float] | None = None,
    alpha: float = 1.0,
    max_epochs: float = 1.0,
) -> list[int]:
    """How many windows each source gives; they add up to `windows`.

    Shares are proportional to `weights`, or to sizes^alpha: 1 is the natural mixture, 0 gives every source the same.
    No source is read more than `max_epochs` times: what one cannot give the others do, in their proportions. Rounded
    by largest remainders.

    Raises:
        ValueError: a number is out of range, or windows is more than all sources together can give.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"mixture: sizes must be at least 1, got {list(sizes)}")
    if weights is not None and len(weights) != len(sizes):
        raise ValueError(f"mixture: weights must be {len(sizes)}, one a source, got {len(weights)}")
    if not (math.isfinite(alpha) and math.isfinite(max_epochs) and max_epochs > 0):
        raise ValueError(f"mixture: alpha must be finite and max_epochs above 0, got {alpha} and {max_epochs}")
    share = np.asarray(weights if weights is not None else np.asarray(sizes, float) ** alpha, np.float64)
    if not np.isfinite(share).all() or (share < 0).any() or not share.any():
        raise ValueError(f"mixture: weights must be finite, not negative and not all 0, got {share.tolist()}")
    most = np.floor(np.asarray(sizes) * max_epochs + 1e-9) * (share > 0)
    if not 1 <= windows <= most.sum():
        raise ValueError(
            f"mixture: windows must lie in [1, {int(most.sum())}], what the sources with a weight give in "
            f"{max_epochs:g} epochs, got {windows}"
        )
    given, full = np.zeros(len(sizes)), np.zeros(len(sizes), bool)
    while True:
        open_share = np.where(full, 0.0, share)
        given = np.where(full, most, open_share / max(open_share.sum(), 1e-300) * (windows - most[full].sum()))
        over = (given > most) & ~full
        if not over.any():
            break
        full |= over
    counts = np.floor(given + 1e-9).astype(np.int64)
    order = np.lexsort((np.arange(len(sizes)), -(given - counts)))
    while (left := windows - counts.sum()) > 0:
        for i in order[counts[order] < most[order]][:left]:
            counts[i] += 1
    return counts.tolist()


def draw(candidates: NDArray[np.int64], count: int, key: str) -> NDArray[np.int64]:
    """`count` of the candidates: all of them as often as it goes, then a draw without replacement."""
    epochs, rest = divmod(count, len(candidates))
    drawn = permute(np.arange(rest, dtype=np.int64), len(candidates), key)
    return np.sort(np.concatenate([np.tile(candidates, epochs), candidates[drawn]]))


def write_mixture(
    out: str | Path,
    pool: Pool,
    examples: NDArray[np.int64],
    settings: dict[str, Any],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackedDataset:
    """A packed dataset whose windows of pool.seq_len tokens are `examples`, in their order.

    The validation split is that of all sources, whole. A window's last target is the first token of the next window:
    one target in seq_len crosses a seam, as it does between two documents. The UTF-8 bytes of a split are estimated
    from those per token of its source.

    Raises:
        ValueError: no examples.
        Further: as `build_dataset` for the folder.
    """
    if not examples.size:
        raise ValueError("write_mixture: examples must name at least one window, got none")
    first = pool.datasets[0]
    info = first.manifest.tokenizer
    content = (first.path / info.file).read_bytes()
    dtype = token_dtype(info.vocab_size)
    with build_folder(Path(out), overwrite) as folder:
        name = folder.free_name("tokenizer.json")
        folder.write(name, content)
        counts = [{"train": Counts(), "val": Counts()} for _ in pool.datasets]
        shards = []
        with ShardWriter(folder, "train", dtype, DEFAULT_SHARD_TOKENS) as writer:
            for start in range(0, examples.size, BATCH):
                part = examples[start : start + BATCH]
                tokens, owners = pool.tokens(part), pool.source(part)
                for owner in np.unique(owners).tolist():
                    _count(counts[owner]["train"], tokens[owners == owner], pool, owner, pool.split)
                writer.write(tokens.astype(dtype).ravel())
                if progress:
                    progress(start + part.size, examples.size)
            # The last window, too, needs a target behind it.
            writer.write(np.array([info.eos_id], dtype))
        counts[int(pool.source(examples[-1:])[0])]["train"].tokens += 1
        shards += writer.shards
        with ShardWriter(folder, "val", dtype, DEFAULT_SHARD_TOKENS) as writer:
            for owner, dataset in enumerate(pool.datasets):
                for start in range(0, dataset.num_tokens("val"), 1 << 22):
                    tokens = dataset.read("val", start, min(start + (1 << 22), dataset.num_tokens("val")))
                    _count(counts[owner]["val"], tokens, pool, owner, "val")
                    writer.write(tokens.astype(dtype))
        shards += writer.shards
        names = [str(dataset.path) for dataset in pool.datasets]
        sources = [SourceInfo(names[i], counts[i], 0, 0) for i in range(len(counts))]
        total = {split: _total([c[split] for c in counts]) for split in ("train", "val")}
        tokenizer = TokenizerInfo(name, info.sha256, info.vocab_size, info.eos_token, info.eos_id)
        folder.finish(Manifest(tokenizer, total, shards, sources, settings=settings))
    return PackedDataset(out)


def _count(to: Counts, tokens: NDArray[np.int64], pool: Pool, owner: int, split: str) -> None:
    to.tokens += tokens.size
    to.documents += int((tokens == pool.eos_id).sum())
    to.bytes += round(tokens.size * pool.datasets[owner].bytes_per_token(split))


def _total(counts: Sequence[Counts]) -> Counts:
    return Counts(sum(c.documents for c in counts), sum(c.tokens for c in counts), sum(c.bytes for c in counts))
