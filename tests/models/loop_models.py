"""Small looped decoders whose parts all do something, and exits by script."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from effkern.models import Decoder, DecoderConfig, ExitTest, LoopConfig

BASE = DecoderConfig(
    vocab_size=37, hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=1, mlp_size=24, max_seq_len=24, head_dim=8,
    stack="looped", loop=LoopConfig("1x1,1x4,1x1"),
)  # fmt: skip


def looped(stages="1x1,1x4,1x1", **loop):
    """The config of these stages."""
    layers = sum(int(part.split("x")[0]) for part in stages.split(","))
    return replace(BASE, num_layers=layers, loop=LoopConfig(stages, **loop))


def noisy(config, seed=1, size=0.3):
    """In float64, every parameter away from its start, in evaluation mode."""
    model = Decoder(config, seed=seed, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
    return model


@dataclass(frozen=True)
class Scripted(ExitTest):
    """Sequence b leaves its pass number i after script[i][b] loops."""

    threshold: float = 1.0
    script: tuple = ()
    reads: ClassVar[str] = "state"
    passes: list = field(default_factory=list)

    def step(self, x, before):
        if before is None:
            before = torch.tensor(self.script[len(self.passes)])
            self.passes.append(before)
        return before - 1, before - 1 <= 0


@dataclass(frozen=True)
class ScriptedByLogits(Scripted):
    """The same, so that the layers behind the loop run after every loop."""

    reads: ClassVar[str] = "logits"
