"""A pass in which every sequence loops until a test lets it go; those that have gone cost nothing any more.

Shape letters: B batch, R sequences that still loop, T new positions, d hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from effkern.models.decoder import Decoder
from effkern.models.exits import ExitTest, ExitTracker
from effkern.models.kv_cache import ALL, KVCache, Rows
from effkern.models.looped import LoopedStack, LoopedStage, PlainStage, Rope


class AdaptivePass(NamedTuple):
    """See adaptive_pass."""

    hidden: Tensor
    """[B, T, d], after the last norm."""
    loops: Tensor
    """Loops that each sequence ran, int64 [B, looped stages]."""


@torch.no_grad()
def adaptive_pass(
    model: Decoder, tokens_BT: Tensor, cache: KVCache, test: ExitTest, *, compact: bool = True
) -> AdaptivePass:
    """New positions on top of a cache; after every loop `test` decides which sequences leave the looped stage.

    A sequence that has left is taken out of the batch (`compact`), so that further loops compute the others alone. Each
    of its layers' later slots gets its last loop's keys and values. A pass of several tokens runs all loops, unless
    test.prefill; then the last position decides for all of its sequence.
    A test that reads logits runs the layers behind the looped stage, and the head for one position, after every loop.

    Args:
        model: looped stack; in evaluation mode if its first state is noise.
        tokens_BT: int64 [B, T].
        cache: of the model, for its most loops. Any policy but "full", where tokens cannot exit early.
        compact: False computes all sequences in all loops and leaves out what the others would have changed: the same
            result, for checks.

    Raises:
        ValueError: stack, cache, policy and test do not go together.

    Memory: rows of cache and state that still loop are copied at each loop once some have gone.
    """
    stack = model.stack
    if not isinstance(stack, LoopedStack):
        raise ValueError(f"adaptive_pass: model must have stack='looped', got {model.config.stack!r}")
    _check_test(stack, test, cache)
    length = tokens_BT.shape[1]
    looped = [i for i, stage in enumerate(stack.stages) if isinstance(stage, LoopedStage)]
    batch, loops = len(tokens_BT), [stage.stage.loops for stage in cache.stages]
    if length > 1 and not test.prefill:
        hidden = model(tokens_BT, cache, loops=[loops[i] for i in looped])
        ran = torch.tensor([[loops[i] for i in looped]] * batch, device=tokens_BT.device)
        return AdaptivePass(hidden, ran)
    cache.check(model.config, model.stages([loops[i] for i in looped]), batch)
    start = cache.begin(length)
    stream, rope = model.embed(tokens_BT, start)
    counts = []
    for i, stage in enumerate(stack.stages):
        if isinstance(stage, LoopedStage):
            run = _Run(model, cache, i, rope, start, compact)
            stream, ran = run(stream, test)
            counts.append(ran)
            if run.reads_logits:
                # The layers behind this stage are part of what its test has read.
                break
        else:
            stream = stage(stream, rope, cache.stages[i], start)
    cache.length += length
    return AdaptivePass(model.norm(stream), torch.stack(counts, dim=1))


def _check_test(stack: LoopedStack, test: ExitTest, cache: KVCache) -> None:
    looped = [stage for stage in stack.stages if isinstance(stage, LoopedStage)]
    if not cache.policy.allows_exits:
        rule = "have another policy than 'full' where tokens may exit early ('latest-available' keeps as much)"
        raise ValueError(f"adaptive_pass: cache must {rule}, got {str(cache.policy)!r}")
    if test.reads == "logits" and len(looped) > 1:
        rule = "read state or gate in a decoder with several looped stages"
        raise ValueError(f"adaptive_pass: test must {rule}, got {type(test).__name__}, which reads logits")
    if test.reads == "gate" and any(stage.gate is None for stage in looped):
        raise ValueError("adaptive_pass: test must not read a gate in a decoder without loop.exit_gate, got GateCDF")


class _Run:
    """One looped stage of one pass."""

    def __init__(self, model: Decoder, cache: KVCache, index: int, rope: Rope, start: int, compact: bool) -> None:
        self.model, self.cache, self.rope, self.start, self.compact = model, cache, rope, start, compact
        self.index, self.slots = index, cache.stages[index]
        self.stage: LoopedStage = model.stack.stages[index]
        self.reads_logits = False

    def __call__(self, stream: Tensor, test: ExitTest) -> tuple[Tensor, Tensor]:
        """What the stage (and those behind it, where logits are read) makes of `stream`, and the loops it took."""
        self.reads_logits = test.reads == "logits"
        batch, length, loops = len(stream), stream.shape[1], self.slots.stage.loops
        tracker, out = ExitTracker(test), torch.empty_like(stream)
        ran = torch.full((batch,), loops, device=stream.device)
        # `looping`: sequences of the batch that still loop. Without compaction the others are computed beside them.
        looping = torch.arange(batch, device=stream.device)
        at = self.stage.begin(stream, self.start)
        for t in range(loops):
            rows = self._rows(looping, batch)
            at = self.stage.advance(at, self.rope, loops, self.slots.views(t, self.start, rows))
            value = self._behind(at.state, rows) if self.reads_logits else at.state
            done = tracker.update(self._signal(test, at.state, at.change, value))
            if t + 1 == loops:
                done = torch.ones_like(done)
            # The place of a looping sequence in what was computed.
            places = torch.arange(len(looping), device=stream.device) if self.compact else looping
            leaves = done[places]
            gone = looping[leaves]
            if len(gone):
                out[gone], ran[gone] = value[places[leaves]], t + 1
                self.slots.fill(t + 1, self.start, self.start + length, gone)
                looping = looping[~leaves]
                if not len(looping):
                    break
                if self.compact:
                    at = at.rows(~leaves)
                    tracker.keep(~leaves)
        return out, ran

    def _rows(self, looping: Tensor, batch: int) -> Rows:
        if len(looping) == batch:
            return ALL
        return Rows.of(looping) if self.compact else Rows(write=looping)

    def _behind(self, state: Tensor, rows: Rows) -> Tensor:
        """The stream after the layers behind this stage. They store their keys again after every loop."""
        for i, stage in enumerate(self.model.stack.stages):
            if i > self.index:
                assert isinstance(stage, PlainStage)
                state = stage(state, self.rope, self.cache.stages[i], self.start, rows)
        return state

    def _signal(self, test: ExitTest, state: Tensor, change: Tensor | None, value: Tensor) -> Tensor:
        if test.reads == "logits":
            return self.model.logits(self.model.norm(value[:, -1]))
        if test.reads == "gate":
            assert self.stage.gate is not None
            return torch.sigmoid(self.stage.gate.logit(state[:, -1]))
        if test.reads == "change":
            assert change is not None
            return change[:, -1]
        return state[:, -1]
