"""One readable decoder whose parts are chosen by a config dataclass. Needs torch alone."""

from effkern.models.adaptive import AdaptivePass, adaptive_pass
from effkern.models.block import Block, PlainStack
from effkern.models.config import DecoderConfig, LaurelConfig
from effkern.models.counts import ForwardFlops, count_parameters, forward_flops
from effkern.models.decoder import Decoder
from effkern.models.exits import EXITS, ExitTest, exit_test
from effkern.models.generate import Generation, generate, generate_with_loops
from effkern.models.kv_cache import KVCache
from effkern.models.kv_policy import KVPolicy
from effkern.models.loop_config import LoopConfig
from effkern.models.looped import LoopedStack
from effkern.models.mlp import SwiGLU
from effkern.models.parts import MLPS, RESIDUALS, STACKS, register
from effkern.models.residual import AddResidual, LaurelBranch
from effkern.models.stages import Stage, parse_stages

__all__ = [
    "EXITS",
    "MLPS",
    "RESIDUALS",
    "STACKS",
    "AdaptivePass",
    "AddResidual",
    "Block",
    "Decoder",
    "DecoderConfig",
    "ExitTest",
    "ForwardFlops",
    "Generation",
    "KVCache",
    "KVPolicy",
    "LaurelBranch",
    "LaurelConfig",
    "LoopConfig",
    "LoopedStack",
    "PlainStack",
    "Stage",
    "SwiGLU",
    "adaptive_pass",
    "count_parameters",
    "exit_test",
    "forward_flops",
    "generate",
    "generate_with_loops",
    "parse_stages",
    "register",
]
