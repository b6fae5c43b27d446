"""A pre-norm block, and the way blocks make a network."""

from collections.abc import Sequence

from torch import Tensor, nn

from effkern.models.attention import Attention
from effkern.models.config import DecoderConfig
from effkern.models.kv_cache import KVCache, KVSlot
from effkern.models.layers import RMSNorm
from effkern.models.parts import MLPS, NOTHING, RESIDUALS, STACKS, Carry, Place, register
from effkern.models.residual import AddResidual
from effkern.models.stages import Stage


class Block(nn.Module):
    """stream -> residual(stream, attention(norm(stream))) -> residual(stream, mlp(norm(stream))).

    A residual that joins the whole block ("block_residual") gets the sum of both branches instead.
    """

    def __init__(self, config: DecoderConfig, layer: int = 0) -> None:
        super().__init__()
        residual = RESIDUALS[config.residual]
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.attention_residual = residual(config, Place(layer, "attn"))
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLPS[config.mlp](config)
        self.block_residual: AddResidual | None = None
        if residual.joins_blocks(config):
            self.block_residual = residual(config, Place(layer, "block"))
        else:
            self.mlp_residual = residual(config, Place(layer, "ffn"))

    @staticmethod
    def count(config: DecoderConfig, layer: int = 0) -> int:
        """Parameters of this part."""
        residual = RESIDUALS[config.residual]
        places = ("attn", "block") if residual.joins_blocks(config) else ("attn", "ffn")
        residuals = sum(residual.count(config, Place(layer, branch)) for branch in places)
        return 2 * config.hidden_size + Attention.count(config) + MLPS[config.mlp].count(config) + residuals

    def forward(
        self, stream: Tensor, rope: tuple[Tensor, Tensor], cache: KVSlot | None = None, carry: Carry = NOTHING
    ) -> tuple[Tensor, Carry]:
        """The new stream, and what residuals of later blocks need of it."""
        first = self.attention(self.attention_norm(stream), rope, cache)
        if self.block_residual is not None:
            _, normed, _ = self.attention_residual.join(stream, first, carry, self.mlp_norm)
            branch = first + self.mlp(normed)
            stream, _, carry = self.block_residual.join(stream, branch, carry)
            return stream, carry
        stream, normed, carry = self.attention_residual.join(stream, first, carry, self.mlp_norm)
        stream, _, carry = self.mlp_residual.join(stream, self.mlp(normed), carry)
        return stream, carry


@register(STACKS, "plain")
class PlainStack(nn.Module):
    """num_layers blocks, each applied once."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        RESIDUALS[config.residual].link(self.blocks)

    @staticmethod
    def count(config: DecoderConfig) -> int:
        """Parameters of this part."""
        return sum(Block.count(config, i) for i in range(config.num_layers))

    @staticmethod
    def applications(config: DecoderConfig) -> int:
        """How often a block runs in one forward pass: the cache slots."""
        return config.num_layers

    @classmethod
    def products(cls, config: DecoderConfig, loops: int | Sequence[int] | None = None) -> float:
        """Weights that a token meets in one forward pass: half its FLOPs, attention's pairs apart."""
        return cls.count(config) / config.num_layers * cls.applications(config)

    @classmethod
    def stages_of(cls, config: DecoderConfig, loops: int | Sequence[int] | None = None) -> tuple[Stage, ...]:
        """One stage without loops."""
        if loops is not None:
            raise ValueError(f"Decoder: loops must be None for stack={config.stack!r}, got {loops!r}")
        return (Stage(cls.applications(config), 1),)

    def forward(self, stream: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        carry = Carry(x0=stream)
        views: Sequence[KVSlot | None] = [None] * len(self.blocks)
        if cache is not None:
            views = cache.stages[0].views(0, cache.length)
        for block, view in zip(self.blocks, views):
            stream, carry = block(stream, rope, view, carry)
        return stream
