"""Soft-label cache: bytes a token, tokens/s written and read, and what writing costs beside the teacher's forward pass.

    python -m benchmarks.soft_labels [--vocab 4096] [--tokens 65536] [--out FILE.json]

The teacher has the shape of the demo's and random weights, made so that its rows are peaked. How peaked decides on
the bytes of sampled labels: benchmarks.sampled_kd has those of a trained teacher.
"write" is labels in memory to a finished shard on disk (pack, hash, fsync), "read" is a batch of 16 random windows from
the memory map, "label" is soft_labels of hidden states, "teacher" the model's forward pass without its output layer.
Reading is checked against what was written before anything is timed.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import numpy as np
import torch

from effkern.data.soft_labels_codec import LabelArrays
from effkern.data.soft_labels_shard import ShardFile, ShardMap
from effkern.data.soft_labels_spec import LabelSpec
from effkern.models import Decoder
from effkern.ops.soft_labels import soft_labels
from effkern.train.presets import PRESETS

SEQ_LEN = 128
METHODS: dict[str, dict[str, Any]] = {
    "sampled 50": {"method": "sampled", "draws": 50},
    "top-16": {"method": "topk", "k": 16},
    "stratified 8 + 8": {"method": "stratified", "k": 8, "draws": 8},
}


# Logits of this standard deviation give a distribution of which 50 draws hit about 12 ids.
SPREAD = 5.0


def teacher(vocab: int) -> tuple[Decoder, torch.Tensor]:
    """A model of the demo teacher's shape, and an output layer that makes peaked rows of its hidden states."""
    config = replace(PRESETS["demo-teacher"].config.model, vocab_size=vocab)
    weight = torch.randn(vocab, config.hidden_size) * (SPREAD / config.hidden_size**0.5)
    return Decoder(config).eval(), weight


def spec(vocab: int, windows: int, options: dict[str, Any]) -> LabelSpec:
    fields = {"k": 0, "draws": 0} | options
    return LabelSpec(
        dataset="0" * 64, tokenizer="0" * 64, teacher="0" * 64, vocab_size=vocab, split="train", seq_len=SEQ_LEN,
        num_windows=windows, windows_sha256="0" * 64, temperature=1.0, seed=0, precision="float32",
        shard_windows=windows, **fields,
    )  # fmt: skip


def median_rate(run: Callable[[], object], tokens: int, rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return tokens / statistics.median(seconds)


def measure(name: str, options: dict[str, Any], a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, weight = teacher(a.vocab)
    windows = a.tokens // SEQ_LEN
    layout = spec(a.vocab, windows, options)
    part = min(windows, 32)
    inputs = torch.randint(a.vocab, (part, SEQ_LEN))
    positions = torch.arange(part * SEQ_LEN)
    with torch.no_grad():
        hidden = model(inputs).flatten(0, 1)
        label = median_rate(
            lambda: soft_labels(hidden, weight, positions=positions, **options), part * SEQ_LEN, a.rounds
        )
        forward = median_rate(lambda: model(inputs), part * SEQ_LEN, a.rounds)
        one = LabelArrays(*(x.numpy() for x in soft_labels(hidden, weight, positions=positions, **options)))
    batches = [one] * (windows // part)
    layout = spec(a.vocab, part * len(batches), options)

    def write() -> None:
        shard = ShardFile(folder, layout, 0)
        for batch in batches:
            shard.write(layout.codec.pack(batch))
        results.append(shard.finish())

    results: list[Any] = []
    tokens = layout.num_tokens
    written = median_rate(write, tokens, a.rounds)
    info = results[-1]
    shard = ShardMap(folder / info.file, layout, 0, info)
    random = np.random.default_rng(0)

    def read() -> LabelArrays:
        parts = [shard.window(int(i)) for i in random.integers(0, layout.num_windows, 16)]
        fields = ("entries", "counts", "tail", "lse")
        packed = type(parts[0])(*(np.concatenate([getattr(p, field) for p in parts]) for field in fields))
        return layout.codec.unpack(packed)

    window = layout.codec.unpack(shard.window(part - 1))
    truth = one.ids[(part - 1) * SEQ_LEN :, : window.ids.shape[1]]
    if not np.array_equal(window.ids, truth):
        raise SystemExit("wrong result: nothing is reported")
    rate = median_rate(read, 16 * SEQ_LEN, 20 * a.rounds)
    size = info.bytes / tokens
    return {
        "labels": name, "entries": info.entries / tokens, "bytes_per_token": size, "share": size / (2 * a.vocab),
        "write_tokens_per_s": written, "read_tokens_per_s": rate, "label_tokens_per_s": label,
        "teacher_tokens_per_s": forward,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1 << 16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the records as JSON")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    try:
        records = [measure(name, options, a, folder) for name, options in METHODS.items()]
    finally:
        shutil.rmtree(folder)
    print(f"all logits in float16: {2 * a.vocab} bytes a token")
    print(
        f"{'labels':<18}{'entries':>8}{'bytes':>8}{'share':>8}{'write/s':>12}{'read/s':>12}{'label/s':>12}{'teacher/s':>12}"
    )
    for r in records:
        print(
            f"{r['labels']:<18}{r['entries']:>8.1f}{r['bytes_per_token']:>8.1f}{r['share']:>8.4f}"
            f"{r['write_tokens_per_s']:>12,.0f}{r['read_tokens_per_s']:>12,.0f}{r['label_tokens_per_s']:>12,.0f}"
            f"{r['teacher_tokens_per_s']:>12,.0f}"
        )
    if a.out:
        case = {"vocab": a.vocab, "tokens": a.tokens, "rounds": a.rounds}
        a.out.write_text(json.dumps({**case, **runner.machine(), "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
