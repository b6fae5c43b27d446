"""Leaf modules that own parameters. Each can fill itself from a generator, so that init never meets the global RNG."""

import hashlib
from typing import cast

import torch
from torch import Tensor, nn


def generator_for(seed: int, name: str) -> torch.Generator:
    """CPU generator made of the seed and a module's name alone: adding a part leaves the others as they were."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fill_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Draw in float32 on the CPU, then copy: the same values on every device and up to rounding in every dtype."""
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std)


class Projection(nn.Linear):
    """Linear map without bias; `init_std` is the standard deviation of its weight at the start."""

    def __init__(self, in_features: int, out_features: int, init_std: float) -> None:
        self.init_std = init_std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Left to `fill`."""

    def fill(self, generator: torch.Generator) -> None:
        fill_normal(self.weight, self.init_std, generator)


class TokenEmbedding(nn.Embedding):
    """Table [padded vocabulary, hidden]."""

    def __init__(self, rows: int, size: int, init_std: float) -> None:
        self.init_std = init_std
        super().__init__(rows, size)

    def reset_parameters(self) -> None:
        """Left to `fill`."""

    def fill(self, generator: torch.Generator) -> None:
        fill_normal(self.weight, self.init_std, generator)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, in float32 at least, rounded once to the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def fill(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return nn.functional.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


def fill_parameters(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` from `seed`, by each module's `fill`, which may also fill its direct children.

    Raises:
        RuntimeError: a module owns parameters and neither it nor its parent can fill them.
    """
    fills = {"": hasattr(model, "fill")}
    for name, module in model.named_modules():
        fills[name] = hasattr(module, "fill")
        if fills[name]:
            cast(Projection, module).fill(generator_for(seed, name))
        elif next(module.parameters(recurse=False), None) is not None and not fills[name.rpartition(".")[0]]:
            raise RuntimeError(f"fill_parameters: module {name!r} owns parameters but has no fill(generator)")
