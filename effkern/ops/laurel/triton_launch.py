"""Launch tables of the Triton kernels: rows and columns of a tile, warps and stages by the width of the low-rank map.

Chosen by what compiles without spills on sm_80, sm_90 and sm_100 (tests/native/triton_resources.json), and by bytes:
the rows of all programs at work must stay in the L2 cache from one pass to the next, while each tile of rows reads A
and B again, r / (2 ROWS) times the traffic of the rows themselves. No GPU has timed them.
"""

from typing import NamedTuple

import triton


class Launch(NamedTuple):
    """One row of a table."""

    limit: int
    """Widest tile that it serves, max(columns of A, rows of B) as a power of 2; 0: no low-rank map."""
    rows: int
    block: int
    """Columns of D per step."""
    warps: int
    stages: int


# Tables by what is launched; float32 multiplies on plain cores, from registers, which takes smaller tiles.
# Few rows ("decode") are one token each of as many sequences: what counts is one launch, and how fast one
# multiprocessor takes in A and B, 4 r D bytes. A program per D chunk would need a second launch, or a wait of all
# programs for each other, before the sums over D. Backward takes at least 16 rows, so that its row of sums per program
# stays small beside the tile.
TABLES = {
    "forward": [Launch(0, 4, 512, 4, 3), Launch(128, 32, 64, 8, 3), Launch(256, 16, 64, 8, 3)],
    "decode": [Launch(0, 1, 2048, 8, 3), Launch(64, 16, 128, 4, 3), Launch(256, 16, 64, 8, 3)],
    "backward": [Launch(0, 16, 128, 4, 3), Launch(64, 32, 64, 8, 3), Launch(256, 32, 32, 8, 3)],
    "forward_float32": [Launch(0, 4, 512, 4, 3), Launch(64, 16, 32, 4, 2), Launch(256, 16, 64, 8, 2)],
    "backward_float32": [Launch(0, 16, 128, 4, 3), Launch(64, 16, 32, 8, 2), Launch(128, 16, 16, 8, 2),
                         Launch(256, 16, 32, 8, 2)],
}  # fmt: skip
TABLES["decode_float32"] = TABLES["forward_float32"]

# Most rows that count as few.
DECODE_ROWS = 64

# Columns of A beyond which x A is torch.mm's: the tile of x A must stay in registers through a pass over D.
ONE_KERNEL = 128


def padded(count: int) -> int:
    """A tile for `count` columns that a tensor core takes."""
    return max(16, triton.next_power_of_2(count)) if count else 0


def launch_of(direction: str, wide: bool, width: int) -> Launch:
    """`wide`: float32 rows; `width`: as in Launch."""
    return next(launch for launch in TABLES[f"{direction}_float32" if wide else direction] if width <= launch.limit)
