"""AdamW over a decoder's parameters."""

import torch
from torch import nn

from effkern.models.layers import TokenEmbedding
from effkern.nn import LaurelResidual
from effkern.nn.looped.parts import Conditioning, LayerScalars
from effkern.train.config import OptimizerConfig


def split_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with weight decay (matrices) and without: 1-d ones, the embedding (also where it is the head), the
    scalars of residuals, which are [k, D] where there is one per channel, and a looped block's tables of scalars and of
    vectors per loop."""
    without = {id(m.weight) for m in model.modules() if isinstance(m, TokenEmbedding)}
    without |= {id(p) for m in model.modules() if isinstance(m, LaurelResidual) for p in m.scalars()}
    without |= {id(m.table) for m in model.modules() if isinstance(m, (LayerScalars, Conditioning))}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        (plain if parameter.dim() < 2 or id(parameter) in without else decayed).append(parameter)
    return decayed, plain


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW with two groups; the learning rate is set at every step."""
    decayed, plain = split_decay(model)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
