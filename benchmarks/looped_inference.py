"""Decoding with looped stages: what the KV policies cost, and what leaving the loop early saves.

    python -m benchmarks.looped_inference [--out FILE.json]

A decoder "1x1,2xL,1x1" with random weights in float32 produces one token for each of B sequences behind a prompt.
policies: bytes of the cache a sequence, and the time of a token, all loops run.
exits: sequences leave after given numbers of loops. `taken out` is the batch compaction of generate, `masked` computes
everything and discards; `share` is the loops that were run over all loops, which is what a perfect compaction costs of
the looped stage. Sequences that leave together, after the same loop, show the cost of a loop; the others that of rows.

Times are medians of process CPU time over rounds in which the variants take turns.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

from effkern.models import Decoder, DecoderConfig, ExitTest, KVCache, LoopConfig, adaptive_pass


@dataclass(frozen=True)
class After(ExitTest):
    """Sequence b leaves after loops[b]."""

    threshold: float = 1.0
    loops: tuple[int, ...] = ()

    def step(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        left = (torch.tensor(self.loops, device=x.device) if before is None else before) - 1
        return left, left <= 0


def patterns(loops: int, batch: int) -> dict[str, tuple[int, ...]]:
    """When each sequence leaves."""
    quarter = max(1, loops // 4)
    spread = [quarter] * (batch // 2) + [2 * quarter] * (batch // 4) + [3 * quarter] * (batch // 8)
    return {
        "none": (loops,) * batch,
        "all after L/4": (quarter,) * batch,
        "half, a quarter, an eighth": tuple(spread + [loops] * (batch - len(spread))),
        "all but one after L/4": (*(quarter,) * (batch - 1), loops),
    }


def filled(model: Decoder, prompt: Tensor, policy: str) -> KVCache:
    cache = model.new_cache(len(prompt), prompt.shape[1] + 1, policy)
    with torch.no_grad():
        model(prompt, cache)
    return cache


def again(cache: KVCache, run: Callable[[KVCache], Any]) -> Callable[[], None]:
    """The same token over and over."""
    length = cache.length

    def step() -> None:
        cache.length = length
        with torch.no_grad():
            run(cache)

    return step


def policies(a: argparse.Namespace, model: Decoder, prompt: Tensor) -> list[dict[str, Any]]:
    names = ["full", "last", "cyclic-2", f"block-{max(2, a.loops // 4)}", "window-64", "latest-available"]
    caches = {name: filled(model, prompt, name) for name in names}
    token = prompt[:, :1]
    timings = runner.interleave({n: again(c, lambda c: model(token, c)) for n, c in caches.items()}, a.rounds)
    records = []
    print(f"{'policy':18}{'KiB a sequence':>16}{'ms a token':>12}")
    for name, cache in caches.items():
        size, ms = cache.nbytes / a.batch / 1024, 1e3 * timings[name].cpu
        print(f"{name:18}{size:16,.0f}{ms:12.2f}", flush=True)
        records.append({"part": "policies", "policy": name, "kib_a_sequence": size, "cpu_ms": ms})
    return records


def exits(a: argparse.Namespace, model: Decoder, prompt: Tensor) -> list[dict[str, Any]]:
    token, variants = prompt[:, :1], {}
    found = patterns(a.loops, a.batch)
    for name, loops in found.items():
        for compact in (True, False):
            cache = filled(model, prompt, "last")
            run = lambda c, loops=loops, compact=compact: adaptive_pass(  # noqa: E731
                model, token, c, After(loops=loops), compact=compact
            )
            variants[f"{name}/{compact}"] = again(cache, run)
    variants["fixed"] = again(filled(model, prompt, "last"), lambda c: model(token, c))
    timings = runner.interleave(variants, a.rounds)
    fixed, records = 1e3 * timings["fixed"].cpu, []
    print(f"{'leave':30}{'share':>8}{'taken out':>12}{'masked':>12}     all loops without a test: {fixed:.2f} ms")
    for name, loops in found.items():
        share = sum(loops) / a.loops / a.batch
        out, masked = (1e3 * timings[f"{name}/{compact}"].cpu for compact in (True, False))
        print(f"{name:30}{share:8.2f}{out:9.2f} ms{masked:9.2f} ms", flush=True)
        records.append(
            {"part": "exits", "leave": name, "share": share, "cpu_ms": out, "masked_ms": masked, "fixed_ms": fixed}
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="of the prompt")
    parser.add_argument("--loops", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write records and machine as JSON")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=4096, hidden_size=a.dim, num_layers=4, num_heads=a.dim // 64, num_kv_heads=max(1, a.dim // 128),
        mlp_size=4 * a.dim, max_seq_len=a.length + 1, stack="looped",
        loop=LoopConfig(f"1x1,2x{a.loops},1x1", injection="add", norm=True),
    )  # fmt: skip
    model = Decoder(config).eval()
    prompt = torch.randint(0, 4096, (a.batch, a.length))
    records = []
    for part in (policies, exits):
        print(f"-- {part.__name__}", flush=True)
        records += part(a, model, prompt)
    if a.out:
        case = {name: getattr(a, name) for name in ("dim", "batch", "length", "loops", "rounds", "threads")}
        a.out.write_text(json.dumps({**case, **runner.machine(), "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
