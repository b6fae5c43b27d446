"""What a dataset holds, as a dictionary and as text (`effkern data stats`)."""

from pathlib import Path
from typing import Any

from effkern.data.manifest import Counts, load_manifest

TOP_REASONS = 5


def stats(path: str | Path) -> dict[str, Any]:
    """Sizes by split and by source, from the manifest alone.

    Returns:
        {"hash", "vocab_size", "eos_token", "shards", "shard_bytes", "splits": {split: row},
        "sources": {name: {"train": row, "val": row, "duplicates", "skipped"}}, "duplicates",
        "skipped", "skipped_reasons": {reason: count}, most frequent first}
        with row = {"documents", "tokens", "bytes", "bytes_per_token"}.
    """
    manifest = load_manifest(path)
    reasons = sorted(manifest.skipped_reasons.items(), key=lambda item: (-item[1], item[0]))
    return {
        "path": str(path),
        "hash": manifest.hash,
        "vocab_size": manifest.tokenizer.vocab_size,
        "eos_token": manifest.tokenizer.eos_token,
        "shards": len(manifest.shards),
        "shard_bytes": sum(shard.bytes for shard in manifest.shards),
        "splits": {name: _row(counts) for name, counts in manifest.splits.items()},
        "sources": {
            source.name: {name: _row(counts) for name, counts in source.splits.items()}
            | {"duplicates": source.duplicates, "skipped": source.skipped}
            for source in manifest.sources
        },
        "duplicates": manifest.duplicates,
        "skipped": sum(manifest.skipped_reasons.values()),
        "skipped_reasons": dict(reasons[:TOP_REASONS]),
    }


def format_stats(numbers: dict[str, Any]) -> str:
    """The result of `stats` as a table."""
    rows = [("", "", "documents", "tokens", "bytes", "bytes/token")]
    for split, row in numbers["splits"].items():
        rows.append(("all", split, *_cells(row)))
    for name, source in numbers["sources"].items():
        rows += [(name, split, *_cells(source[split])) for split in numbers["splits"]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in pairs).rstrip()
        for pairs in (list(enumerate(zip(row, widths))) for row in rows)
    ]
    skipped = ", ".join(f"{reason} {count}" for reason, count in numbers["skipped_reasons"].items())
    lines += [
        "",
        f"vocabulary  {numbers['vocab_size']}, documents end with {numbers['eos_token']}",
        f"shards      {numbers['shards']} ({numbers['shard_bytes']:,} bytes)",
        f"duplicates  {numbers['duplicates']} dropped",
        f"skipped     {numbers['skipped']}" + (f" ({skipped})" if skipped else ""),
        f"hash        {numbers['hash']}",
    ]
    return "\n".join(lines)


def _row(counts: Counts) -> dict[str, Any]:
    ratio = counts.bytes / counts.tokens if counts.tokens else None
    return {"documents": counts.documents, "tokens": counts.tokens, "bytes": counts.bytes, "bytes_per_token": ratio}


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    ratio = row["bytes_per_token"]
    return f"{row['documents']:,}", f"{row['tokens']:,}", f"{row['bytes']:,}", "-" if ratio is None else f"{ratio:.3f}"
