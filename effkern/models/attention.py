"""Causal grouped-query attention, with and without a cache of keys and values.

Shape letters: B batch, T new positions, S all positions, H query heads, K key/value heads, D head size.
"""

import torch
from torch import Tensor, nn

from effkern.models.config import DecoderConfig
from effkern.models.kv_cache import KVSlot
from effkern.models.layers import Projection
from effkern.models.rope import apply_rope


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D) + causal mask) v, through torch's scaled_dot_product_attention."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_size
        width, d = self.heads * self.head_dim, config.hidden_size
        self.qkv = Projection(d, width + 2 * self.kv_heads * self.head_dim, d**-0.5)
        self.out = Projection(width, d, (2 * config.depth * width) ** -0.5)

    @staticmethod
    def count(config: DecoderConfig) -> int:
        """Parameters of this part."""
        return 2 * config.hidden_size * config.head_size * (config.num_heads + config.num_kv_heads)

    def forward(self, x_BTE: Tensor, rope: tuple[Tensor, Tensor], cache: KVSlot | None = None) -> Tensor:
        batch, length, _ = x_BTE.shape
        heads = self.qkv(x_BTE).view(batch, length, -1, self.head_dim).transpose(1, 2)
        turned, value = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        query, key = apply_rope(turned, rope).split((self.heads, self.kv_heads), dim=1)
        mask, causal, rows = None, True, None
        if cache is not None:
            key, value, past, rows = cache.extend(key, value)
            causal = past == 0
            if rows is not None:
                query = query.new_zeros(len(key), *query.shape[1:]).index_copy_(0, rows, query)
            if not causal and length > 1:
                mask = torch.ones(length, past + length, dtype=torch.bool, device=x_BTE.device).tril(past)
        mixed_BHTD = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=self.heads != self.kv_heads
        )
        if rows is not None:
            mixed_BHTD = mixed_BHTD[rows]
        return self.out(mixed_BHTD.transpose(1, 2).reshape(batch, length, -1))
