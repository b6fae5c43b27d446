"""A pre-norm block, the way its branches join the stream, and the way blocks make a network."""

from torch import Tensor, nn

from effkern.models.attention import Attention, KVCache, LayerCache
from effkern.models.config import DecoderConfig
from effkern.models.layers import RMSNorm
from effkern.models.parts import MLPS, RESIDUALS, STACKS, register


@register(RESIDUALS, "add")
class AddResidual(nn.Module):
    """x + f(x). Other residuals own parameters; they get the stream and the branch's output."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()

    @staticmethod
    def count(config: DecoderConfig) -> int:
        """Parameters of this part."""
        return 0

    def forward(self, stream: Tensor, branch: Tensor) -> Tensor:
        return stream + branch


class Block(nn.Module):
    """stream -> residual(stream, attention(norm(stream))) -> residual(stream, mlp(norm(stream)))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.attention_residual = RESIDUALS[config.residual](config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLPS[config.mlp](config)
        self.mlp_residual = RESIDUALS[config.residual](config)

    @staticmethod
    def count(config: DecoderConfig) -> int:
        """Parameters of this part."""
        residuals = 2 * RESIDUALS[config.residual].count(config)
        return 2 * config.hidden_size + Attention.count(config) + MLPS[config.mlp].count(config) + residuals

    def forward(self, stream: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None = None) -> Tensor:
        stream = self.attention_residual(stream, self.attention(self.attention_norm(stream), rope, cache))
        return self.mlp_residual(stream, self.mlp(self.mlp_norm(stream)))


@register(STACKS, "plain")
class PlainStack(nn.Module):
    """num_layers blocks, each applied once."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    @staticmethod
    def count(config: DecoderConfig) -> int:
        """Parameters of this part."""
        return config.num_layers * Block.count(config)

    @staticmethod
    def applications(config: DecoderConfig) -> int:
        """How often a block runs in one forward pass: the cache slots, and the factor of the FLOP count."""
        return config.num_layers

    def forward(self, stream: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        for i, block in enumerate(self.blocks):
            stream = block(stream, rope, None if cache is None else cache.layers[i])
        return stream
