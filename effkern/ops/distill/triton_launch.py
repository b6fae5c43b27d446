"""Launch tables of the Triton row passes: columns per step, warps and registers by size of the vocabulary.

Chosen by what the compiler needs without spilling on sm_80, sm_90 and sm_100 (tests/native/triton_resources.json). No
GPU has timed them.

- Up to 128 registers, two programs of 8 warps share a multiprocessor. Held to 96, some divergences spill 8 bytes.
- Dense rows of 4096 take up to 252 registers in 8 warps, and spill 16 bytes in 16 warps with 128. Rows of 8192 spill
  up to 200 bytes: from there on every pass reads the row again, mostly from the cache while rows are short.
- Sparse rows hold one model: 8192 take up to 128 registers in 16 warps, 16384 spill 48 bytes.
- Rows beyond: one 16-byte load of each model per thread and step with a dense teacher, two otherwise.
"""

from typing import NamedTuple

import triton

from effkern.ops.distill.rows import DIVERGENCES


class Launch(NamedTuple):
    """One row of a table."""

    limit: int
    """Largest vocabulary that it serves."""
    block: int
    """Columns per step; a row with no more than these is read once and stays in registers."""
    warps: int
    registers: int
    """Most registers per thread."""


DENSE_LAUNCH = [
    Launch(1024, 1024, 8, 128),
    Launch(2048, 2048, 16, 128),
    Launch(4096, 4096, 8, 255),
    Launch(1 << 31, 1024, 8, 128),
]
SPARSE_LAUNCH = [
    Launch(1024, 1024, 8, 128),
    Launch(4096, 4096, 8, 128),
    Launch(8192, 8192, 16, 128),
    Launch(1 << 31, 2048, 8, 128),
]

# Entries of the tile in which the kept slots look for their equals.
EQUALS = 4096


def needs_middle_pass(divergence: str) -> bool:
    """A sum over normalised p and q before the gradient; for losses of normalised logits it gives their moments."""
    return DIVERGENCES[divergence].passes == 3 or divergence in ("zscored_mse", "cosine")


def launch_of(table: list[Launch], vocab: int) -> Launch:
    return next(launch for launch in table if vocab <= launch.limit)


def kept_blocks(num_kept: int) -> dict[str, int]:
    """Slots of a sparse teacher, and how many are compared with all of them at a time."""
    kept = triton.next_power_of_2(max(num_kept, 1))
    return {"KEPT": kept, "CHUNK": min(kept, max(1, EQUALS // kept))}
