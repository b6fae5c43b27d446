"""What a row pass takes and how many entries it makes.

    R rows of the chunk, V vocabulary (entries below vocab_valid only), K slots a row

Every implementation has the signature of `reference.reference_rows`.
"""

from typing import NamedTuple

METHODS = ("topk", "sampled", "stratified")


class RowOptions(NamedTuple):
    """The scalars of the op, as the kernels take them."""

    method: str
    k: int
    draws: int
    temperature: float
    seed: int


def num_slots(options: RowOptions, vocab: int) -> int:
    """K: min(k, V) for the head, and as many as there are draws, at most V, for what is drawn."""
    head = 0 if options.method == "sampled" else min(options.k, vocab)
    drawn = 0 if options.method == "topk" else min(options.draws, vocab)
    return head + drawn
