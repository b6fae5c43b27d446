"""One readable decoder whose parts are chosen by a config dataclass. Needs torch alone."""

from effkern.models.attention import KVCache
from effkern.models.block import Block, PlainStack
from effkern.models.config import DecoderConfig, LaurelConfig
from effkern.models.counts import ForwardFlops, count_parameters, forward_flops
from effkern.models.decoder import Decoder
from effkern.models.generate import generate
from effkern.models.mlp import SwiGLU
from effkern.models.parts import MLPS, RESIDUALS, STACKS, register
from effkern.models.residual import AddResidual, LaurelBranch

__all__ = [
    "MLPS",
    "RESIDUALS",
    "STACKS",
    "AddResidual",
    "Block",
    "Decoder",
    "DecoderConfig",
    "ForwardFlops",
    "KVCache",
    "LaurelBranch",
    "LaurelConfig",
    "PlainStack",
    "SwiGLU",
    "count_parameters",
    "forward_flops",
    "generate",
    "register",
]
