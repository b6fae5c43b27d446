"""What a device can do at best: published figures of known GPUs, and a quick measurement of anything else.

Published: NVIDIA's data sheets, dense (no sparsity). What large kernels reach of them is stated beside them and was
not measured by us: 0.75 of the matrix rate (public H100 measurements of large bf16 products lie at 0.70 to 0.80) and
0.9 of the memory bandwidth.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

MATRIX_SHARE, BANDWIDTH_SHARE = 0.75, 0.9

# Bytes of one V-wide chunk buffer on a CPU, whose caches the chunk should not leave: 256 rows at V = 32000.
CPU_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Ceilings:
    """Rates that a large kernel reaches: FLOP/s of matrix products by element bytes, memory bytes/s, and sizes."""

    name: str
    matrix: dict[int, float]
    bandwidth: float
    memory: int
    vector: float | None = None
    """Single-lane float32 instructions per second, for what a fused kernel does beside its products."""
    is_cpu: bool = False

    @property
    def chunk_bytes(self) -> int:
        """Default size of one V-wide float32 buffer: 32 MiB on a CPU, 1/64 of a GPU's memory."""
        return CPU_CHUNK_BYTES if self.is_cpu else self.memory // 64


def _gpu(name: str, bf16: float, fp32: float, bandwidth: float, gigabytes: int) -> Ceilings:
    """From TFLOP/s and TB/s of the data sheet. float32 products are taken without TF32, torch's default."""
    return Ceilings(
        name,
        {2: bf16 * 1e12 * MATRIX_SHARE, 4: fp32 * 1e12 * MATRIX_SHARE},
        bandwidth * 1e12 * BANDWIDTH_SHARE,
        gigabytes * 10**9,
        # A fused multiply-add counts as two FLOPs.
        fp32 * 1e12 / 2,
    )


# The first name that a device's name contains counts.
KNOWN = {
    "h100": _gpu("H100 SXM", 989, 67, 3.35, 80),
    "h200": _gpu("H200 SXM", 989, 67, 4.8, 141),
    "a100": _gpu("A100 SXM 80 GB", 312, 19.5, 2.04, 80),
    "a100-40": _gpu("A100 SXM 40 GB", 312, 19.5, 1.555, 40),
    "b200": _gpu("B200 (HGX)", 2250, 80, 8.0, 180),
}
# What torch.cuda.get_device_name says, of parts that the table is right for.
_TORCH_NAMES = {
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "A100-SXM4-80GB": "a100",
    "A100-SXM4-40GB": "a100-40",
    "B200": "b200",
}


def known(name: str) -> Ceilings:
    """Ceilings of a GPU by its short name."""
    if name not in KNOWN:
        raise ValueError(f"ceilings: device must be one of {', '.join(KNOWN)}, got {name!r}")
    return KNOWN[name]


@cache
def of_device(device: torch.device) -> Ceilings | None:
    """What is known of `device` without measuring anything; None for a GPU that the table does not hold."""
    if device.type == "cpu":
        return Ceilings("CPU", {}, 0.0, 0, is_cpu=True)
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    short = next((short for part, short in _TORCH_NAMES.items() if found.name.endswith(part)), None)
    return None if short is None else replace(KNOWN[short], name=found.name, memory=found.total_memory)


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Ceilings of this machine from one product and one copy, in about a second; synchronises."""
    is_cpu = device.type == "cpu"
    size = 1024 if is_cpu else 8192
    x = torch.randn(size, size, device=device).to(dtype)
    matrix = 2 * size**3 / _best(lambda: torch.mm(x, x), device)
    # Far beyond any cache; a copy reads and writes.
    source = torch.empty(64 << 20 if is_cpu else 1 << 30, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    bandwidth = 2 * source.numel() / _best(lambda: target.copy_(source), device)
    memory = 0 if is_cpu else torch.cuda.get_device_properties(device).total_memory
    return Ceilings(f"{device} (measured)", {dtype.itemsize: matrix}, bandwidth, memory, is_cpu=is_cpu)


def _best(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    seconds = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = min(seconds, time.perf_counter() - start)
    return seconds
