"""Embeddings of examples by a trained proxy model: means of its token table, or of its last hidden states."""

import numpy as np
import torch
from numpy.typing import NDArray

from effkern.data.curation.pool import Pool
from effkern.data.curation.post import Projection
from effkern.models import Decoder
from effkern.ops.mean_pool import fold_projection, mean_pool, norm_mean_pool

KINDS = ("token", "output")


class Embedder:
    """Means of the proxy's rows over each example, without the end-of-text tokens.

    "token": rows of the input embedding table, no forward pass. "output": hidden states after the last norm, which is
    computed inside the mean.

    Args:
        model: the proxy, in eval mode, on its device.
        pool: the examples; the tokenizer is the caller's to compare.
        kind: "token" or "output".

    Source: arXiv 2502.02494, section on embeddings.
    """

    def __init__(self, model: Decoder, pool: Pool, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"embed: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "output" and pool.seq_len > model.config.max_seq_len:
            raise ValueError(f"embed: seq_len must be at most {model.config.max_seq_len}, got {pool.seq_len}")
        self.model, self.pool, self.kind = model, pool, kind
        self.device = model.embedding.weight.device
        self._folded: torch.Tensor | None = None

    @torch.no_grad()
    def raw(self, examples: NDArray[np.int64]) -> NDArray[np.float32]:
        """Means [B, D], before any projection."""
        tokens = torch.from_numpy(self.pool.tokens(examples)).to(self.device)
        offsets = torch.arange(0, tokens.numel() + 1, self.pool.seq_len, device=self.device)
        if self.kind == "token":
            table = self.model.embedding.weight
            found = mean_pool(table, tokens.flatten(), offsets, eod=self.pool.eos_id)
        else:
            stream, rope = self.model.embed(tokens, 0)
            hidden = self.model.stack(stream, rope, None).flatten(0, 1)
            norm = self.model.norm
            keep = tokens.flatten() != self.pool.eos_id
            found = norm_mean_pool(hidden, offsets, keep=keep, norm_weight=norm.weight, eps=norm.eps)
        return found.cpu().numpy()

    @torch.no_grad()
    def projected(self, examples: NDArray[np.int64], projection: Projection) -> NDArray[np.float32]:
        """Rows [B, K] of length 1. For "token" the projection is folded into the table once."""
        if self.kind == "output":
            return projection(self.raw(examples))
        if self._folded is None:
            parts = (torch.from_numpy(x) for x in (projection.mean, projection.scale, projection.components))
            self._folded = fold_projection(self.model.embedding.weight, *(x.to(self.device) for x in parts))
        tokens = torch.from_numpy(self.pool.tokens(examples)).to(self.device)
        offsets = torch.arange(0, tokens.numel() + 1, self.pool.seq_len, device=self.device)
        return mean_pool(self._folded, tokens.flatten(), offsets, eod=self.pool.eos_id, normalize=True).cpu().numpy()
