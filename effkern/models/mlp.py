"""Position-wise networks."""

from torch import Tensor, nn

from effkern.models.config import DecoderConfig
from effkern.models.layers import Projection
from effkern.models.parts import MLPS, register


@register(MLPS, "swiglu")
class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        d, m = config.hidden_size, config.mlp_size
        self.gate_up = Projection(d, 2 * m, d**-0.5)
        self.down = Projection(m, d, (2 * config.depth * m) ** -0.5)

    @staticmethod
    def count(config: DecoderConfig) -> int:
        """Parameters of this part."""
        return 3 * config.hidden_size * config.mlp_size

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)
