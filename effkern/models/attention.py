"""Causal grouped-query attention, with and without a cache of keys and values.

Shape letters: B batch, T new positions, S all positions, H query heads, K key/value heads, D head size.
"""

import torch
from torch import Tensor, nn

from effkern.models.config import DecoderConfig
from effkern.models.layers import Projection
from effkern.models.rope import apply_rope


class LayerCache:
    """Keys and values of one attention layer, preallocated for `max_len` positions."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, key_BKTD: Tensor, value_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions; return views of all positions so far."""
        end = self.length + key_BKTD.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"LayerCache: positions must be at most {self.keys.shape[2]}, got {end}")
        self.keys[:, :, self.length : end] = key_BKTD
        self.values[:, :, self.length : end] = value_BKTD
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """One LayerCache per application of an attention layer."""

    def __init__(
        self, config: DecoderConfig, slots: int, batch: int, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch, config.num_kv_heads, max_len, config.head_size)
        self.layers = [LayerCache(shape, device, dtype) for _ in range(slots)]

    @property
    def length(self) -> int:
        return self.layers[0].length


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D) + causal mask) v, through torch's scaled_dot_product_attention."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_size
        width, d = self.heads * self.head_dim, config.hidden_size
        self.qkv = Projection(d, width + 2 * self.kv_heads * self.head_dim, d**-0.5)
        self.out = Projection(width, d, (2 * config.num_layers * width) ** -0.5)

    @staticmethod
    def count(config: DecoderConfig) -> int:
        """Parameters of this part."""
        return 2 * config.hidden_size * config.head_size * (config.num_heads + config.num_kv_heads)

    def forward(self, x_BTE: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None = None) -> Tensor:
        batch, length, _ = x_BTE.shape
        heads = self.qkv(x_BTE).view(batch, length, -1, self.head_dim).transpose(1, 2)
        turned, value = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        query, key = apply_rope(turned, rope).split((self.heads, self.kv_heads), dim=1)
        mask, causal = None, True
        if cache is not None:
            past = cache.length
            key, value = cache.append(key, value)
            causal = past == 0
            if not causal and length > 1:
                mask = torch.ones(length, past + length, dtype=torch.bool, device=x_BTE.device).tril(past)
        mixed_BHTD = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=self.heads != self.kv_heads
        )
        return self.out(mixed_BHTD.transpose(1, 2).reshape(batch, length, -1))
