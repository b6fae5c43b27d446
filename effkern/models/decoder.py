"""The decoder: tokens in, hidden states out; the loss op meets the head's weight."""

import torch
from torch import Tensor, nn

from effkern.models.attention import KVCache
from effkern.models.config import DecoderConfig
from effkern.models.layers import Projection, RMSNorm, TokenEmbedding, fill_parameters
from effkern.models.parts import STACKS
from effkern.models.rope import rope_table


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
        self.to(device=device, dtype=dtype)

    @property
    def head_weight(self) -> Tensor:
        """[padded vocabulary, d]; the embedding itself when the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def vocab_valid(self) -> int | None:
        """Number of real rows of the head, or None when it has no padding."""
        return None if self.config.padded_vocab == self.config.vocab_size else self.config.vocab_size

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the last norm, [B, T, d]; with a cache, of the new positions only.

        Raises:
            ValueError: the sequence is longer than config.max_seq_len.
        """
        start, length = (0 if cache is None else cache.length), tokens_BT.shape[1]
        if start + length > self.config.max_seq_len:
            raise ValueError(
                f"Decoder: tokens must be at most max_seq_len={self.config.max_seq_len} positions, got {start + length}"
            )
        stream = self.embedding(tokens_BT)
        rope = rope_table(start, length, self.config.head_size, self.config.rope_theta, stream.device, stream.dtype)
        return self.norm(self.stack(stream, rope, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the real tokens, [..., vocab_size]. For sampling: training never makes them."""
        return nn.functional.linear(hidden, self.head_weight[: self.config.vocab_size])

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_len` tokens; dtype and device are those of the weights."""
        slots = STACKS[self.config.stack].applications(self.config)
        return KVCache(self.config, slots, batch, max_len, self.embedding.weight.device, self.embedding.weight.dtype)
