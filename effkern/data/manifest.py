"""manifest.json: what a packed dataset holds, and the one hash that stands for its content."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

FORMAT = "effkern-tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")


@dataclass
class Counts:
    """`tokens` count the end-of-text token of each document; `bytes` are those of the UTF-8 text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class ShardInfo:
    """One file of raw little-endian token ids."""

    file: str
    split: str
    dtype: str
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenizerInfo:
    file: str
    sha256: str
    vocab_size: int
    eos_token: str
    eos_id: int


@dataclass(frozen=True)
class SourceInfo:
    name: str
    splits: dict[str, Counts]
    duplicates: int
    skipped: int


@dataclass(frozen=True)
class SkippedFile:
    source: str
    name: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """Everything known about a dataset. `skipped_reasons` is complete, `skipped` lists the first 10,000."""

    tokenizer: TokenizerInfo
    splits: dict[str, Counts]
    shards: list[ShardInfo]
    sources: list[SourceInfo]
    duplicates: int = 0
    skipped_reasons: dict[str, int] = field(default_factory=dict)
    skipped: list[SkippedFile] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """sha256 over what a training run sees: tokenizer, splits, shards.

        File names, paths, source names, settings, versions and times are not in it.
        """
        content = {
            "format": [FORMAT, FORMAT_VERSION],
            "tokenizer": {key: value for key, value in asdict(self.tokenizer).items() if key != "file"},
            "splits": {name: asdict(counts) for name, counts in self.splits.items()},
            "shards": [{k: v for k, v in asdict(shard).items() if k != "file"} for shard in self.shards],
        }
        return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def files(self) -> set[str]:
        """Names of the files that belong to the dataset, beside the manifest itself."""
        return {self.tokenizer.file, *(shard.file for shard in self.shards)}

    def to_json(self) -> str:
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "hash": self.hash}
        return json.dumps(head | asdict(self), indent=1) + "\n"


def load_manifest(path: str | Path) -> Manifest:
    """Read `path`/manifest.json.

    Raises:
        FileNotFoundError: no manifest, so no finished dataset.
        ValueError: not a manifest, one of another format version, or one changed after it was written.
    """
    file = Path(path) / MANIFEST
    try:
        raw = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        state = "an unfinished build or another folder" if Path(path).is_dir() else "no such folder"
        raise FileNotFoundError(f"load_manifest: path must hold a {MANIFEST}, got {state}: {path}") from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"{file}: must be a manifest of format {FORMAT!r}")
    if raw.get("format_version") != FORMAT_VERSION:
        version = raw.get("format_version")
        raise ValueError(f"{file}: format_version must be {FORMAT_VERSION}, got {version}; build the dataset again")
    try:
        manifest = _parse(raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: a field is missing or malformed ({error})") from None
    if manifest.hash != raw.get("hash"):
        raise ValueError(f"{file}: was changed after the build (its hash does not match its content)")
    for name in manifest.files():
        if not name or Path(name).name != name:
            raise ValueError(f"{file}: file names must have no folder, got {name!r}")
    return manifest


def _parse(raw: Mapping[str, Any]) -> Manifest:
    return Manifest(
        tokenizer=TokenizerInfo(**raw["tokenizer"]),
        splits={name: Counts(**raw["splits"][name]) for name in SPLITS},
        shards=[ShardInfo(**shard) for shard in raw["shards"]],
        sources=[
            SourceInfo(**source | {"splits": {name: Counts(**counts) for name, counts in source["splits"].items()}})
            for source in raw["sources"]
        ],
        duplicates=raw["duplicates"],
        skipped_reasons=raw["skipped_reasons"],
        skipped=[SkippedFile(**entry) for entry in raw["skipped"]],
        settings=raw["settings"],
        versions=raw["versions"],
    )
