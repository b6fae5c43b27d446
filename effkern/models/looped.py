"""A decoder's stack of stages, some of which loop: prelude, core and coda of "4x1,4x4,4x1"."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effkern.models.block import Block
from effkern.models.config import DecoderConfig
from effkern.models.kv_cache import ALL, KVCache, KVSlot, Rows, StageCache
from effkern.models.layers import generator_for
from effkern.models.parts import STACKS, register
from effkern.models.stages import Stage, parse_stages
from effkern.nn import ExitGate, LoopedBlock, LoopState
from effkern.nn.looped.parts import FEATURES

Rope = tuple[Tensor, Tensor]


class Layer(Block):
    """A Block that hands on the stream alone: what a residual reads of earlier ones has no meaning across loops."""

    def forward(self, stream: Tensor, rope: Rope, cache: KVSlot | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(stream, rope, cache)[0]


class PlainStage(nn.Module):
    """Layers that run once."""

    def __init__(self, config: DecoderConfig, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)

    def forward(
        self, stream: Tensor, rope: Rope, cache: StageCache | None = None, start: int = 0, rows: Rows = ALL
    ) -> Tensor:
        views: Sequence[KVSlot | None] = [None] * len(self.blocks) if cache is None else cache.views(0, start, rows)
        for block, view in zip(self.blocks, views):
            stream = block(stream, rope, view)
        return stream


class LoopedStage(nn.Module):
    """Layers that run several times, in a LoopedBlock."""

    def __init__(self, config: DecoderConfig, stage: Stage, layers: Sequence[Layer], index: int) -> None:
        super().__init__()
        self.stage, loop = stage, config.loop
        self.noisy, self.samples = loop.init == "noise", loop.sample != "none"
        self.block = LoopedBlock(
            layers, loop.sampler(stage) or stage.loops, dim=config.hidden_size, mode=loop.execution(), init=loop.init,
            injection=loop.injection, residual=loop.residual, rank=loop.rank, conditioning=loop.conditioning,
            max_loops=loop.most_loops(stage), layer_scalars=loop.layer_scalars, norm=loop.norm,
            norm_eps=config.norm_eps, seed=index,
        )  # fmt: skip
        self.gate = ExitGate(config.hidden_size) if loop.exit_gate else None

    @staticmethod
    def own_parameters(config: DecoderConfig, stage: Stage) -> int:
        """Parameters beside those of the layers."""
        d, loop = config.hidden_size, config.loop
        most = loop.most_loops(stage) or 0
        return (
            {"learned": d}.get(loop.init, 0)
            + {"linear": 2 * d * d, "gate": 2 * d, "convex": d}.get(loop.injection, 0)
            + (2 + 2 * d * loop.rank if loop.residual == "laurel" else 0)
            + {"table": most * d, "sinusoidal": (FEATURES + 1) * d, "time": (2 * FEATURES + 2 + d) * d}.get(
                loop.conditioning, 0
            )
            + {"increment": 1, "stream": 2}.get(loop.layer_scalars, 0) * most * stage.layers
            + (d if loop.norm else 0)
            + (d + 1 if loop.exit_gate else 0)
        )

    @staticmethod
    def own_products(config: DecoderConfig, stage: Stage) -> int:
        """Weights that a token meets beside those of the layers, over all loops."""
        d, loop = config.hidden_size, config.loop
        # Of W [h; e] the half of e is the same in every loop.
        linear = (stage.loops + 1) * d * d if loop.injection == "linear" else 0
        return linear + stage.loops * (
            (2 * d * loop.rank if loop.residual == "laurel" else 0) + (d if loop.norm else 0)
        )

    def forward(
        self, stream: Tensor, rope: Rope, cache: StageCache | None = None, start: int = 0,
        *, loops: int | None = None, step: int | None = None,
    ) -> Tensor:  # fmt: skip
        # Numbers are drawn in training alone; evaluation has those of the config.
        if loops is None and not (self.training and self.samples):
            loops = self.stage.loops
        per_layer = None
        if cache is not None:
            assert loops is not None
            per_layer = {"cache": [cache.views(t, start) for t in range(loops)]}
        mode = None
        if not torch.is_grad_enabled():
            # There is nothing to keep, and nothing to truncate.
            mode = "full"
        elif cache is not None:
            # A loop that runs again would store its keys twice.
            mode = "autograd"
        state = self.first_state(stream, start)
        return self.block(stream, rope, loops=loops, step=step, mode=mode, state=state, per_layer=per_layer)

    def all_states(
        self, stream: Tensor, rope: Rope, *, loops: int | None = None, step: int | None = None
    ) -> tuple[Tensor, ...]:
        """h_1 .. h_L."""
        if loops is None and not (self.training and self.samples):
            loops = self.stage.loops
        return self.block.all_states(stream, rope, loops=loops, step=step, state=self.first_state(stream, 0))

    def first_state(self, stream: Tensor, start: int) -> Tensor | None:
        """h_0 where the block shall not make it: noise of evaluation, which is the same for a position in any pass."""
        if self.training or not self.noisy:
            return None
        _, length, width = stream.shape
        rows = [position_noise(position, width) for position in range(start, start + length)]
        return torch.stack(rows).to(stream).expand_as(stream)

    def begin(self, stream: Tensor, start: int) -> LoopState:
        return self.block.start(stream, self.first_state(stream, start))

    def advance(self, at: LoopState, rope: Rope, loops: int, views: list[KVSlot]) -> LoopState:
        """One loop of `loops`, with the cache slots of its layers."""
        nothing = [None] * self.stage.layers
        rows = [views if t == at.loop else nothing for t in range(loops)]
        return self.block.advance(at, rope, loops=loops, per_layer={"cache": rows})


@functools.lru_cache(maxsize=8192)
def position_noise(position: int, width: int) -> Tensor:
    """LoopedBlock's noise, [width], float32: a function of its arguments alone."""
    std = math.sqrt(2 / 5)
    generator = generator_for(position, "loop state")
    return nn.init.trunc_normal_(torch.zeros(width), std=std, a=-3 * std, b=3 * std, generator=generator)


@register(STACKS, "looped")
class LoopedStack(nn.Module):
    """config.loop.stages, one after another. Parameters are those of one run of every stage."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList()
        first = 0
        for index, stage in enumerate(parse_stages(config.loop.stages)):
            layers = [Layer(config, first + i) for i in range(stage.layers)]
            first += stage.layers
            looped = stage.looped
            self.stages.append(LoopedStage(config, stage, layers, index) if looped else PlainStage(config, layers))

    def seed_loops(self, seed: int) -> None:
        """Drawn numbers of loops are functions of (seed, stage, step) from now on."""
        for index, stage in enumerate(self.stages):
            if isinstance(stage, LoopedStage):
                stage.block.seed = seed * len(self.stages) + index

    @staticmethod
    def stages_of(config: DecoderConfig, loops: int | Sequence[int] | None = None) -> tuple[Stage, ...]:
        """The stages, with other numbers of loops if given: one for all looped stages, or one for each.

        Raises:
            ValueError, TypeError: `loops` is not of this form, or below 1.
        """
        stages = parse_stages(config.loop.stages)
        if loops is None:
            return stages
        looped = sum(stage.looped for stage in stages)
        if not isinstance(loops, (int, Sequence)):
            raise TypeError(f"Decoder: loops must be a whole number, or one for each looped stage, got {loops!r}")
        given = [loops] * looped if isinstance(loops, int) else list(loops)
        if len(given) != looped:
            raise ValueError(f"Decoder: loops must be one number, or one for each of {looped} stages, got {loops!r}")
        for value in given:
            if type(value) is not int:
                raise TypeError(f"Decoder: loops must be whole numbers, got {loops!r}")
            if value < 1:
                raise ValueError(f"Decoder: loops must be at least 1, got {loops!r}")
        numbers = iter(given)
        return tuple(stage._replace(loops=next(numbers)) if stage.looped else stage for stage in stages)

    @staticmethod
    def count(config: DecoderConfig) -> int:
        """Parameters of this part."""
        stages = parse_stages(config.loop.stages)
        layers = sum(Block.count(config, i) for i in range(config.num_layers))
        return layers + sum(LoopedStage.own_parameters(config, stage) for stage in stages if stage.looped)

    @staticmethod
    def applications(config: DecoderConfig) -> int:
        """How often a block runs in one forward pass."""
        return sum(stage.applications for stage in parse_stages(config.loop.stages))

    @classmethod
    def products(cls, config: DecoderConfig, loops: int | Sequence[int] | None = None) -> float:
        """Weights that a token meets in one forward pass."""
        stages = cls.stages_of(config, loops)
        per_layer = sum(Block.count(config, i) for i in range(config.num_layers)) / config.num_layers
        own = [LoopedStage.own_products(config, now) for now, s in zip(stages, cls.stages_of(config)) if s.looped]
        return per_layer * sum(stage.applications for stage in stages) + sum(own)

    def forward(
        self, stream: Tensor, rope: Rope, cache: KVCache | None = None,
        *, loops: int | Sequence[int] | None = None, step: int | None = None,
    ) -> Tensor:  # fmt: skip
        start = 0 if cache is None else cache.length
        fixed = self.stages_of(self.config, loops)
        for i, stage in enumerate(self.stages):
            slots = None if cache is None else cache.stages[i]
            if isinstance(stage, LoopedStage):
                # A cache is for the loops it was made for, and in training without one they may be drawn.
                count = None if loops is None and cache is None else fixed[i].loops
                stream = stage(stream, rope, slots, start, loops=count, step=step)
            else:
                stream = stage(stream, rope, slots, start)
        return stream

    def all_outputs(
        self, stream: Tensor, rope: Rope, *, loops: int | Sequence[int] | None = None, step: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the stages behind the looped one make of each of its states, [L, B, T, d], and the log probabilities of
        its gate, [L, B, T].

        Raises:
            ValueError: several stages loop.
        """
        looped = [i for i, stage in enumerate(self.stages) if isinstance(stage, LoopedStage)]
        if len(looped) > 1:
            raise ValueError(f"Decoder: stages must have one that loops for loop_outputs, got {len(looped)}")
        count = None if loops is None else self.stages_of(self.config, loops)[looped[0]].loops
        states: tuple[Tensor, ...] = ()
        for stage in self.stages:
            if isinstance(stage, LoopedStage):
                states = stage.all_states(stream, rope, loops=count, step=step)
                assert stage.gate is not None
                log_probs = stage.gate(states).log_probs
                # The states of all loops as one batch.
                stream = torch.cat(states)
            else:
                stream = stage(stream, rope)
        return stream.unflatten(0, (len(states), -1)), log_probs
