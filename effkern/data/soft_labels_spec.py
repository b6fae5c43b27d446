"""What a soft-label cache was made from, its manifest, and how it differs from what is asked for."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from effkern.data.soft_labels_codec import Codec

FORMAT = "effkern-soft-labels"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPEC = "spec.json"
WINDOWS = "windows.bin"

# What to call each field in an error.
_NAMES = {
    "dataset": "dataset (hash of its shards)",
    "tokenizer": "tokenizer (hash)",
    "teacher": "teacher (hash of its weights)",
    "seq_len": "packing (seq_len)",
    "split": "packing (split)",
    "windows_sha256": "windows (hash of their list)",
}


@dataclass(frozen=True)
class LabelSpec:
    """Everything the labels depend on, known before the first is made. Windows are those of `data.order`."""

    dataset: str
    """Manifest hash of the packed dataset."""
    tokenizer: str
    """sha256."""
    teacher: str
    """sha256 of the weights file."""
    vocab_size: int
    split: str
    seq_len: int
    num_windows: int
    windows_sha256: str
    """Of the list of window numbers, int64."""
    method: str
    k: int
    draws: int
    temperature: float
    """Divided the teacher's logits before anything was sampled or cut off."""
    seed: int
    precision: str
    """Of the teacher's matrix products: float32 or bfloat16."""
    shard_windows: int
    """Windows of a shard file; the last has the rest."""

    def __post_init__(self) -> None:
        for name in ("num_windows", "seq_len", "shard_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"LabelSpec: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"LabelSpec: temperature must be positive and finite, got {self.temperature}")
        assert self.codec

    @cached_property
    def codec(self) -> Codec:
        return Codec(self.method, self.vocab_size, self.k, self.draws)

    @property
    def num_shards(self) -> int:
        return -(-self.num_windows // self.shard_windows)

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.seq_len

    def shard_size(self, shard: int) -> int:
        """Windows of shard number `shard`."""
        return min(self.shard_windows, self.num_windows - shard * self.shard_windows)

    @cached_property
    def hash(self) -> str:
        return _digest({"format": [FORMAT, FORMAT_VERSION], "spec": asdict(self)})

    def differences(self, other: "LabelSpec") -> list[str]:
        """One line for each field in which `other` is not the same."""
        return [
            difference(f.name, a, b)
            for f in fields(self)
            if (a := getattr(self, f.name)) != (b := getattr(other, f.name))
        ]

    def to_json(self) -> str:
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "hash": self.hash}
        return json.dumps(head | {"spec": asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True)
class LabelShard:
    """One file of labels."""

    file: str
    windows: int
    entries: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LabelManifest:
    """A finished cache."""

    spec: LabelSpec
    shards: tuple[LabelShard, ...]

    @cached_property
    def hash(self) -> str:
        """sha256 over the spec and the content of all shards."""
        return _digest({"spec": self.spec.hash, "shards": [asdict(shard) for shard in self.shards]})

    @property
    def entries(self) -> int:
        return sum(shard.entries for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Of all files beside this manifest and the spec."""
        return sum(shard.bytes for shard in self.shards) + 8 * self.spec.num_windows

    def to_json(self) -> str:
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "hash": self.hash}
        body = {"spec": asdict(self.spec), "shards": [asdict(shard) for shard in self.shards]}
        return json.dumps(head | body, indent=1) + "\n"


def difference(name: str, was: object, now: object) -> str:
    """One line of an error; hashes are cut to what a reader can compare."""
    text = [value[:12] if isinstance(value, str) and len(value) == 64 else str(value) for value in (was, now)]
    return f"{_NAMES.get(name, name)}: {text[0]} in the cache, {text[1]} asked for"


def load_spec(path: Path) -> LabelSpec | None:
    """The spec of an unfinished or finished cache, or None. Raises ValueError as `load_labels` does."""
    if not (path / SPEC).exists():
        return None
    raw = _read(path / SPEC)
    spec = _parse_spec(path / SPEC, raw)
    if spec.hash != raw.get("hash"):
        raise ValueError(f"{path / SPEC}: was changed after it was written (its hash does not match its content)")
    return spec


def load_labels(path: str | Path) -> LabelManifest:
    """Read `path`/manifest.json.

    Raises:
        FileNotFoundError: no manifest, so no finished cache; the message says whether a run of the writer can go on.
        ValueError: not a manifest, one of another format version, or one changed after it was written.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        if (file.parent / SPEC).exists():
            state = "an unfinished cache (run the command that makes it again: it goes on)"
        else:
            state = "another folder" if file.parent.is_dir() else "no such folder"
        raise FileNotFoundError(f"load_labels: path must hold a finished soft-label cache, got {state}: {path}")
    raw = _read(file)
    spec = _parse_spec(file, raw)
    try:
        manifest = LabelManifest(spec, tuple(LabelShard(**shard) for shard in raw["shards"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: a field is missing or malformed ({error})") from None
    if manifest.hash != raw.get("hash"):
        raise ValueError(f"{file}: was changed after it was written (its hash does not match its content)")
    return manifest


def _read(file: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"{file}: must be a file of format {FORMAT!r}")
    if raw.get("format_version") != FORMAT_VERSION:
        version = raw.get("format_version")
        raise ValueError(f"{file}: format_version must be {FORMAT_VERSION}, got {version}; make the cache again")
    return raw


def _parse_spec(file: Path, raw: Mapping[str, Any]) -> LabelSpec:
    try:
        return LabelSpec(**raw["spec"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: a field is missing or malformed ({error})") from None


def _digest(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
