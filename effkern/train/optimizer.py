"""AdamW or Shampoo over a decoder's parameters."""

from typing import Any

import torch
from torch import nn

from effkern.models import Decoder
from effkern.models.layers import TokenEmbedding
from effkern.nn import LaurelResidual
from effkern.nn.looped.parts import Conditioning, LayerScalars
from effkern.train.config import OptimizerConfig, TrainConfig


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


def build_optimizer(model: nn.Module, config: OptimizerConfig, root_group: Any = None) -> torch.optim.Optimizer:
    """The optimizer of a run; the learning rate is set at every step. `root_group`: processes that share the roots.

    adamw: fused AdamW with two groups. shampoo: the matrices that have decay, apart from the output layer, go to
    Shampoo; the output layer and the rest stay with AdamW, in the same optimizer.
    """
    decayed, plain = split_decay(model)
    if config.name == "adamw":
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        fused = all(p.device.type != "meta" for p in decayed + plain)
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)
    return _shampoo(model, config, decayed, plain, root_group)


def _shampoo(
    model: nn.Module,
    config: OptimizerConfig,
    decayed: list[nn.Parameter],
    plain: list[nn.Parameter],
    root_group: Any,
) -> torch.optim.Optimizer:
    # torch.optim alone is what most runs need.
    from effkern.optim.shampoo import Shampoo
    from effkern.optim.shampoo.blocks import is_matrix

    names = {id(p): name for name, p in model.named_parameters()}
    head = getattr(model, "head", None)
    beside = {id(p) for p in decayed if not is_matrix(tuple(p.shape))}
    beside |= set() if head is None else {id(p) for p in head.parameters()}
    chosen = config.shampoo
    kinds: list[tuple[list[nn.Parameter], dict[str, Any]]] = [
        ([p for p in decayed if id(p) not in beside],
         {"rule": "shampoo", "weight_decay": config.weight_decay,
          "lr_ratio": chosen.lr_ratio}),
        ([p for p in decayed if id(p) in beside], {"rule": "adamw", "weight_decay": config.weight_decay}),
        (plain, {"rule": "adamw", "weight_decay": 0.0}),
    ]  # fmt: skip
    return Shampoo(
        [{"params": [(names[id(p)], p) for p in members], **options} for members, options in kinds if members],
        lr=config.lr,
        betas=(config.beta1, chosen.beta2),
        adamw_betas=(config.beta1, config.beta2),
        eps=config.eps,
        exponents=chosen.exponent or None,
        side=chosen.side,
        ridge=chosen.ridge,
        grafting=chosen.grafting,
        precondition_frequency=chosen.precondition_frequency,
        start_step=chosen.start_step,
        block_size=chosen.block_size,
        root_group=root_group,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of a step: `rate` times the group's lr_ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def parameter_report(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Which parameter is in which group, by name."""
    from effkern.optim.shampoo import Shampoo, describe

    if isinstance(optimizer, Shampoo):
        return describe(optimizer).splitlines()
    names = {id(p): name for name, p in model.named_parameters()}
    lines = []
    for number, group in enumerate(optimizer.param_groups):
        members = [names[id(p)] for p in group["params"]]
        count = sum(p.numel() for p in group["params"])
        lines.append(
            f"group {number}: AdamW, {len(members)} parameters, {count:,} numbers, "
            f"weight decay {group['weight_decay']:g}"
        )
        lines.append(f"  {members[0]}" + (f" .. {members[-1]}" if len(members) > 1 else ""))
    return lines


def planned(config: TrainConfig) -> tuple[list[str], int]:
    """The report of a run before it starts, and the bytes of its optimizer's state; no memory is taken."""
    with torch.device("meta"):
        model = Decoder(config.model)
        optimizer = build_optimizer(model, config.optimizer)
    if config.optimizer.name == "adamw":
        return parameter_report(model, optimizer), 8 * sum(p.numel() for p in model.parameters())
    from effkern.optim.shampoo import Shampoo
    from effkern.optim.shampoo.groups import planned_bytes

    assert isinstance(optimizer, Shampoo)
    return parameter_report(model, optimizer), planned_bytes(optimizer)
