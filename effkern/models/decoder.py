"""The decoder: tokens in, hidden states out; the loss op meets the head's weight."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkern.models.config import DecoderConfig
from effkern.models.kv_cache import KVCache
from effkern.models.kv_policy import KVPolicy
from effkern.models.layers import Projection, RMSNorm, TokenEmbedding, fill_parameters
from effkern.models.parts import STACKS
from effkern.models.rope import rope_table
from effkern.models.stages import Stage


class LoopOutputs(NamedTuple):
    """See Decoder.loop_outputs."""

    hidden: Tensor
    """[L, B, T, d]."""
    log_probs: Tensor
    """log p_t of an exit after loop t, [L, B, T]."""


class Decoder(nn.Module):
    """Pre-norm decoder. Parameters depend on (config, seed) alone, not on the device or the global RNG.

    hidden = model(tokens)               [B, T] -> [B, T, d]
    loss over hidden, model.head_weight  [padded vocabulary, d], with vocab_valid = model.vocab_valid
    logits = model.logits(hidden)        [..., vocab_size], for sampling
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.padded_vocab, config.hidden_size, config.init_std)
        self.stack = STACKS[config.stack](config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head: Projection | None = None
        if not config.tie_head:
            self.head = Projection(config.hidden_size, config.padded_vocab, config.init_std)
        fill_parameters(self, seed)
        if hasattr(self.stack, "seed_loops"):
            self.stack.seed_loops(seed)
        self.to(device=device, dtype=dtype)

    @property
    def head_weight(self) -> Tensor:
        """[padded vocabulary, d]; the embedding itself when the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def vocab_valid(self) -> int | None:
        """Number of real rows of the head, or None when it has no padding."""
        return None if self.config.padded_vocab == self.config.vocab_size else self.config.vocab_size

    def forward(
        self,
        tokens_BT: Tensor,
        cache: KVCache | None = None,
        *,
        loops: int | Sequence[int] | None = None,
        step: int | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [B, T, d]; with a cache, of the new positions only.

        Args:
            loops: of this call, for all looped stages or one for each; None: the config's. A cache must be for them.
            step: of training, where a looped stack draws them.

        Raises:
            ValueError: the sequence is longer than config.max_seq_len; loops or cache do not fit the stack; a training
                call has no step to draw loops from.
        """
        start, length = 0, tokens_BT.shape[1]
        if cache is not None:
            cache.check(self.config, self.stages(loops), len(tokens_BT))
            start = cache.begin(length)
        stream, rope = self.embed(tokens_BT, start)
        looped: dict[str, Any] = {} if loops is None and step is None else {"loops": loops, "step": step}
        if looped and self.config.stack == "plain":
            # Raises where loops are given; a step alone is nothing to a stack that draws none.
            self.stages(loops)
            looped = {}
        stream = self.stack(stream, rope, cache, **looped)
        if cache is not None:
            cache.length += length
        return self.norm(stream)

    def loop_outputs(
        self, tokens_BT: Tensor, *, loops: int | Sequence[int] | None = None, step: int | None = None
    ) -> LoopOutputs:
        """Hidden states after the last norm had the decoder stopped after loop t, for t = 1 .. L, and the gate's exits.

        Raises:
            ValueError: the decoder has no exit gate, or several looped stages; see also forward.
        """
        if not self.config.loop.exit_gate:
            raise ValueError(f"Decoder: loop.exit_gate must be True for loop_outputs, got {self.config.loop.exit_gate}")
        stream, rope = self.embed(tokens_BT, 0)
        hidden, log_probs = self.stack.all_outputs(stream, rope, loops=loops, step=step)
        return LoopOutputs(self.norm(hidden), log_probs)

    def embed(self, tokens_BT: Tensor, start: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The stream before the first block, and the rotations, of positions from `start` on.

        Raises:
            ValueError: they go beyond config.max_seq_len.
        """
        length = tokens_BT.shape[1]
        if start + length > self.config.max_seq_len:
            raise ValueError(
                f"Decoder: tokens must be at most max_seq_len={self.config.max_seq_len} positions, got {start + length}"
            )
        stream = self.embedding(tokens_BT)
        rope = rope_table(start, length, self.config.head_size, self.config.rope_theta, stream.device, stream.dtype)
        return stream, rope

    def stages(self, loops: int | Sequence[int] | None = None) -> tuple[Stage, ...]:
        """Layers and loops of every stage of the stack, with these loops in place of the config's."""
        return STACKS[self.config.stack].stages_of(self.config, loops)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the real tokens, [..., vocab_size]. For sampling: training never makes them."""
        return nn.functional.linear(hidden, self.head_weight[: self.config.vocab_size])

    def new_cache(
        self,
        batch: int,
        max_len: int,
        policy: str | KVPolicy = "full",
        *,
        loops: int | Sequence[int] | None = None,
    ) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_len` tokens; dtype and device are those of the weights.

        Args:
            policy: what looped stages keep (effkern.models.kv_policy). loops: those of the calls it will be used in.
        """
        weight = next(self.parameters())
        return KVCache(self.config, self.stages(loops), batch, max_len, weight.device, weight.dtype, policy)
