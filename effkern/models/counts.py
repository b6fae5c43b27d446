"""Sizes from the formula, without building the model."""

from collections.abc import Sequence
from typing import NamedTuple

from effkern.models.config import DecoderConfig
from effkern.models.parts import STACKS


class ForwardFlops(NamedTuple):
    """FLOPs of one forward pass, per token (a multiply-add is two)."""

    blocks: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.blocks + self.attention + self.head


def count_parameters(config: DecoderConfig) -> int:
    """Parameters of Decoder(config): embedding, blocks, last norm, and the head unless tied."""
    table = config.padded_vocab * config.hidden_size
    return table * (1 if config.tie_head else 2) + STACKS[config.stack].count(config) + config.hidden_size


def forward_flops(config: DecoderConfig, seq_len: int, loops: int | Sequence[int] | None = None) -> ForwardFlops:
    """2 FLOPs per weight of the blocks, each time it is used, and of the head; causal attention 2 * width * seq_len per
    application of a block. `loops`: of looped stages, one number or one for each; the config's by default.

    Attention: q k^T and p v are 2 * 2 * width per (query, key) pair, and a query meets (seq_len + 1)/2 keys on average.
    A backward pass costs twice the forward pass.
    """
    stack = STACKS[config.stack]
    applications = sum(stage.applications for stage in stack.stages_of(config, loops))
    width = config.num_heads * config.head_size
    return ForwardFlops(
        blocks=2.0 * stack.products(config, loops),
        attention=2.0 * width * (seq_len + 1) * applications,
        head=2.0 * config.padded_vocab * config.hidden_size,
    )
