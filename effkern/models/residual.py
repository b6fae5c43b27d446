"""The ways in which a branch joins the stream."""

from torch import Tensor, nn

from effkern.models.config import DecoderConfig
from effkern.models.layers import RMSNorm
from effkern.models.parts import RESIDUALS, Carry, Place, register
from effkern.nn import LaurelResidual
from effkern.nn.laurel import VARIANTS


@register(RESIDUALS, "add")
class AddResidual(nn.Module):
    """x + f(x). Others own parameters; a simple one overrides `count` and `forward`."""

    def __init__(self, config: DecoderConfig, place: Place) -> None:
        super().__init__()

    @staticmethod
    def count(config: DecoderConfig, place: Place) -> int:
        """Parameters of this part."""
        return 0

    @staticmethod
    def joins_blocks(config: DecoderConfig) -> bool:
        """Whether a residual around the whole block takes the place of the second one."""
        return False

    @staticmethod
    def link(blocks: nn.ModuleList) -> None:
        """Tell residuals of each other, once all blocks are there."""

    def forward(self, stream: Tensor, branch: Tensor) -> Tensor:
        return stream + branch

    def join(
        self, stream: Tensor, branch: Tensor, carry: Carry, norm: RMSNorm | None = None
    ) -> tuple[Tensor, Tensor | None, Carry]:
        """The new stream, the same behind `norm`, and what the next residual needs of this one."""
        stream = self(stream, branch)
        return stream, None if norm is None else norm(stream), carry


@register(RESIDUALS, "laurel")
class LaurelBranch(AddResidual):
    """config.laurel's residual where its placement says so, and x + f(x) elsewhere; a norm behind it comes fused."""

    def __init__(self, config: DecoderConfig, place: Place) -> None:
        super().__init__(config, place)
        self.laurel: LaurelResidual | None = None
        span = _span(config, place)
        if span is not None:
            c = config.laurel
            self.laurel = LaurelResidual(
                config.hidden_size, c.variant, rank=c.rank, num_previous=span[0], num_following=span[1],
                scalar_map=c.scalar_map, per_channel=c.per_channel, x0=c.x0, init=c.init,
                save_branch=c.save_branch or None,
            )  # fmt: skip

    @staticmethod
    def count(config: DecoderConfig, place: Place) -> int:
        span = _span(config, place)
        if span is None:
            return 0
        c = config.laurel
        return LaurelResidual.count(
            config.hidden_size, c.variant, rank=c.rank, num_previous=span[0], num_following=span[1],
            scalar_map=c.scalar_map, per_channel=c.per_channel, x0=c.x0,
        )  # fmt: skip

    @staticmethod
    def joins_blocks(config: DecoderConfig) -> bool:
        return config.laurel.placement == "block"

    @staticmethod
    def link(blocks: nn.ModuleList) -> None:
        LaurelResidual.link([m for block in blocks for m in block.modules() if isinstance(m, LaurelResidual)])

    def join(
        self, stream: Tensor, branch: Tensor, carry: Carry, norm: RMSNorm | None = None
    ) -> tuple[Tensor, Tensor | None, Carry]:
        if self.laurel is None:
            return super().join(stream, branch, carry, norm)
        step = self.laurel(
            branch, stream, carry.history, x0=None if self.laurel.x0_weight is None else carry.x0,
            norm_weight=None if norm is None else norm.weight, norm_eps=1e-6 if norm is None else norm.eps,
        )  # fmt: skip
        return step.y, step.normed, carry._replace(history=step.history)


def _span(config: DecoderConfig, place: Place) -> tuple[int, int] | None:
    """How many earlier residuals this one reads, and by how many it is read; None: a plain one stands here."""
    c = config.laurel
    places = {"both": ("attn", "ffn")}.get(c.placement, (c.placement,))
    if place.branch not in places:
        return None
    if not VARIANTS[c.variant].previous:
        return 0, 0
    index = place.layer * len(places) + places.index(place.branch)
    total = config.num_layers * len(places)
    return min(c.look_back - 1, index), min(c.look_back - 1, total - 1 - index)
