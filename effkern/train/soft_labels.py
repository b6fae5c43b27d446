"""`effkern data soft-labels`: run a trained model over packed windows and write what it says to a cache."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effkern.data import BatchOrder, PackedDataset
from effkern.data.order import num_windows
from effkern.data.soft_labels_codec import LabelArrays
from effkern.data.soft_labels_spec import LabelSpec
from effkern.data.soft_labels_writer import WriteResult, free_bytes, windows_hash, write_soft_labels
from effkern.ops.soft_labels import soft_labels
from effkern.train.device import autocast, choose_device, choose_precision
from effkern.train.restore import LoadedModel, load_model
from effkern.train.step import to_device

# k and draws where none are given. 50 draws come to about 12 ids a token (arXiv 2503.16870).
DEFAULTS = {"sampled": (0, 50), "topk": (16, 0), "stratified": (8, 8)}


@dataclass(frozen=True)
class LabelOptions:
    """What to label and how; zeros stand for the defaults that the fields name."""

    method: Literal["sampled", "topk", "stratified"] = "sampled"
    k: int = 0
    """Entries of topk (default 16) and of the exact head of stratified (8)."""
    draws: int = 0
    """Of sampled (default 50) and of the tail of stratified (8)."""
    temperature: float = 1.0
    seed: int = 0
    """Of the draws."""
    split: Literal["train", "val"] = "train"
    seq_len: int = 0
    """Default: that of the teacher's own training. Must be the student's."""
    steps: int = 0
    """Label what the first steps of a run read (its schedule.kd_steps), in its order; default: every window."""
    batch_size: int = 0
    """With steps: data.batch_size of that run."""
    order_seed: int = 0
    """With steps: data.seed of that run."""
    batch_windows: int = 16
    """Sequences of one forward pass of the teacher."""
    shard_tokens: int = 1 << 22
    """Tokens of one file: what is lost at most when the writer is killed."""
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        for name in ("k", "draws", "seq_len", "steps", "batch_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"soft labels: {name} must be at least 0, got {getattr(self, name)}")
        for name in ("batch_windows", "shard_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"soft labels: {name} must be at least 1, got {getattr(self, name)}")
        if (self.steps == 0) != (self.batch_size == 0):
            raise ValueError(
                f"soft labels: steps and batch_size must be given together, got {self.steps} and {self.batch_size}"
            )
        if self.method not in DEFAULTS:
            raise ValueError(f"soft labels: method must be one of {', '.join(DEFAULTS)}, got {self.method!r}")
        for name, value, default in zip(("k", "draws"), (self.k, self.draws), DEFAULTS[self.method]):
            if value and not default:
                raise ValueError(f"soft labels: {name} must be 0 for method={self.method}, got {value}")

    @property
    def entries(self) -> tuple[int, int]:
        """(k, draws) with the defaults in place."""
        k, draws = DEFAULTS[self.method]
        return self.k or k, self.draws or draws


def windows_of_steps(order: BatchOrder, steps: int) -> NDArray[np.int64]:
    """The windows that steps 0 ... steps - 1 read, each once, in the order of first use."""
    # The first epoch has every window.
    found = np.concatenate([order.indices(step) for step in range(min(steps, order.steps_per_epoch))])
    _, first = np.unique(found, return_index=True)
    return found[np.sort(first)]


@dataclass(frozen=True)
class LabelEstimate:
    """Size and time of a cache before it is written, from a few batches."""

    spec: LabelSpec
    entries: float
    """A token, as measured."""
    tokens_per_s: float
    free: int

    @property
    def bytes(self) -> int:
        return self._bytes(self.entries)

    @property
    def most(self) -> int:
        return self._bytes(self.spec.codec.slots)

    def _bytes(self, entries: float) -> int:
        spec = self.spec
        token = entries * spec.codec.width + spec.codec.token_bytes
        return round(token * spec.num_tokens) + 16 * spec.num_windows + 80 * spec.num_shards

    def render(self) -> str:
        spec, codec = self.spec, self.spec.codec
        parameters = [f"k {spec.k}"] * (spec.k > 0) + [f"draws {spec.draws}"] * (spec.draws > 0)
        whole = 2 * spec.vocab_size * spec.num_tokens
        seconds = spec.num_tokens / self.tokens_per_s
        return "\n".join(
            [
                f"windows   {spec.num_windows:,} of {spec.split}, {spec.num_tokens:,} tokens (seq_len {spec.seq_len})",
                f"method    {spec.method}, {', '.join(parameters)}, temperature {spec.temperature:g}, {spec.precision}",
                f"entry     {codec.width} bytes ({codec.id_bits}-bit id, {codec.code_bits}-bit value); "
                f"{codec.token_bytes} bytes a token beside them",
                f"entries   {self.entries:.1f} a token as measured, {codec.slots} at most",
                f"size      {_bytes(self.bytes)} expected, {_bytes(self.most)} at most, in {spec.num_shards} files; "
                f"all logits in float16: {_bytes(whole)}",
                f"free      {_bytes(self.free)}",
                f"time      {seconds:,.0f} s at {self.tokens_per_s:,.0f} tokens/s",
            ]
        )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:,.3g} TiB"


class SoftLabelJob:
    """A teacher, a dataset, and the cache to be made of them.

    Raises:
        ValueError: tokenizer, vocabulary or length of the teacher do not fit the dataset, or an option is out of range.
        CheckpointError: the teacher cannot be read.
    """

    def __init__(self, teacher: str | Path, data: str | Path, options: LabelOptions) -> None:
        self.options = options
        self.device = choose_device(options.device)
        self.dtype = choose_precision(options.precision, self.device)
        self.dataset = PackedDataset(data)
        loaded = load_model(teacher, self.device)
        self.model = loaded.model
        seq_len = options.seq_len or loaded.meta["config"]["data"]["seq_len"]
        _check_teacher(loaded, self.dataset, seq_len)
        if options.steps:
            order = BatchOrder(
                self.dataset, options.split, seq_len=seq_len, batch_size=options.batch_size, seed=options.order_seed
            )
            self.windows = windows_of_steps(order, options.steps)
        else:
            count = num_windows(self.dataset, options.split, seq_len)
            if count == 0:
                raise ValueError(f"soft labels: split {options.split!r} must hold a window of {seq_len} + 1 tokens")
            self.windows = np.arange(count, dtype=np.int64)
        k, draws = options.entries
        self.spec = LabelSpec(
            dataset=self.dataset.hash,
            tokenizer=self.dataset.manifest.tokenizer.sha256,
            teacher=loaded.weights_hash,
            vocab_size=self.model.config.vocab_size,
            split=options.split,
            seq_len=seq_len,
            num_windows=len(self.windows),
            windows_sha256=windows_hash(self.windows),
            method=options.method,
            k=k,
            draws=draws,
            temperature=options.temperature,
            seed=options.seed,
            precision=str(self.dtype).removeprefix("torch."),
            shard_windows=max(1, options.shard_tokens // seq_len),
        )
        self._weight: Tensor | None = None

    @torch.no_grad()
    def label(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> LabelArrays:
        """What the teacher says behind each of `tokens` [B, seq_len]; `positions` number them for the draws."""
        spec = self.spec
        with autocast(self.device, self.dtype):
            hidden = self.model(to_device(tokens, self.device)).flatten(0, 1)
        if self._weight is None:
            self._weight = self.model.head_weight.to(self.dtype)
        found = soft_labels(
            hidden.to(self.dtype),
            self._weight,
            method=spec.method,
            k=spec.k or None,
            draws=spec.draws or None,
            temperature=spec.temperature,
            seed=spec.seed,
            positions=to_device(positions, self.device).flatten(),
            vocab_valid=self.model.vocab_valid,
        )
        return LabelArrays(*(part.cpu().numpy() for part in found))

    def estimate(self, out: str | Path, batches: int = 3) -> LabelEstimate:
        """Size and time, from the first windows; the first batch is not timed."""
        size, seq_len = self.options.batch_windows, self.spec.seq_len
        entries = tokens = 0
        start = time.perf_counter()
        for number in range(batches):
            part = self.windows[number * size : (number + 1) * size]
            if not part.size:
                break
            starts = part * seq_len
            rows = self.dataset.windows(self.spec.split, starts, seq_len)
            packed = self.spec.codec.pack(self.label(rows, starts[:, None] + np.arange(seq_len)))
            if number == 0 and len(self.windows) > size:
                start = time.perf_counter()
                continue
            entries, tokens = entries + int(packed.counts.sum()), tokens + rows.size
        speed = tokens / (time.perf_counter() - start)
        return LabelEstimate(self.spec, entries / tokens, speed, free_bytes(Path(out)))

    def write(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> WriteResult:
        """Make the cache, or what is missing of it; arguments and errors are those of `write_soft_labels`."""
        return write_soft_labels(
            out,
            self.dataset,
            self.spec,
            self.windows,
            self.label,
            batch_windows=self.options.batch_windows,
            overwrite=overwrite,
            progress=progress,
            stop=stop,
        )


def _check_teacher(loaded: LoadedModel, dataset: PackedDataset, seq_len: int) -> None:
    was, now = loaded.inputs.tokenizer, dataset.manifest.tokenizer.sha256
    if was != now:
        raise ValueError(f"teacher must have the tokenizer of data ({now[:12]}), got {was[:12]} in {loaded.path}")
    shape = loaded.model.config
    if shape.vocab_size < dataset.vocab_size:
        raise ValueError(
            f"teacher must have vocab_size >= {dataset.vocab_size} for {dataset.path}, got {shape.vocab_size}"
        )
    if shape.max_seq_len < seq_len:
        raise ValueError(
            f"teacher must have max_seq_len >= seq_len={seq_len}, got {shape.max_seq_len} in {loaded.path}"
        )
