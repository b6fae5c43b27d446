"""What a looped block owns besides its core: start, injection, residual, conditioning and scalars of the loops.

D channels, r rank, F features of a time, M most loops. Each hands out the tensors of a call; none runs inside a loop.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from effkern.nn.laurel import column_orthogonal

STARTS = ("input", "zeros", "learned", "noise")
INJECTIONS = ("none", "add", "linear", "gate", "convex")
RESIDUALS = ("none", "laurel", "euler")
CONDITIONINGS = ("none", "table", "sinusoidal", "time")
SCALARS = ("none", "increment", "stream", "argument")

# Width of sines and cosines of a loop's number or time.
FEATURES = 64


def _wide(p: Tensor, x: Tensor) -> torch.dtype:
    """What is made of p for x is computed in: float32, or float64 where one of them is."""
    return torch.promote_types(torch.promote_types(p.dtype, x.dtype), torch.float32)


class FullPrecision(nn.Module):
    """Keeps its own parameters in float32: `.to(dtype)` and `.half()` leave them."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Copies of the gradients, as those are cast in place.
        mine = {n: p for n, p in self._parameters.items() if p is not None}
        before = {n: (p.detach(), None if p.grad is None else p.grad.clone()) for n, p in mine.items()}
        super()._apply(fn, recurse)
        for name, p in self._parameters.items():
            if p is not None and p.dtype in (torch.bfloat16, torch.float16):
                value, grad = before[name]
                p.grad = None
                p.data = value.to(p.device)
                p.grad = None if grad is None else grad.to(p.device)
        return self


class Map(nn.Linear):
    """A linear map whose weight starts normal with standard deviation `std`, and its bias at 0."""

    def __init__(self, inputs: int, outputs: int, std: float, bias: bool, device: Any, dtype: Any) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias, device, dtype)

    def reset_parameters(self) -> None:
        self.fill()

    @torch.no_grad()
    def fill(self, generator: torch.Generator | None = None) -> None:
        if self.std and self.weight.device.type != "meta":
            values = torch.randn(self.weight.shape, generator=generator, dtype=torch.float32)
            self.weight.copy_(values * self.std)
        else:
            self.weight.zero_()
        if self.bias is not None:
            self.bias.zero_()


class Start(nn.Module):
    """h_0: x itself, zeros, a learned vector for every token, or truncated normal noise.

    noise: standard deviation sqrt(2/5) before the cut at 3 of them: sqrt(2/(5 D)) times sqrt(D), as in Huginn.
    """

    def __init__(self, kind: str, dim: int | None, device: Any, dtype: Any) -> None:
        super().__init__()
        self.kind = kind
        self.vector: nn.Parameter | None = None
        if kind == "learned":
            assert dim is not None
            self.vector = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
            self.fill()

    @torch.no_grad()
    def fill(self, generator: torch.Generator | None = None) -> None:
        if self.vector is not None:
            self.vector.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "zeros":
            return torch.zeros_like(x)
        if self.vector is not None:
            return self.vector.to(x.dtype).expand_as(x)
        if self.kind == "noise":
            return truncated_noise(x)
        return x


def truncated_noise(x: Tensor) -> Tensor:
    """Like x, from the default generator of its device."""
    noise = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32), requires_grad=False)
    std = math.sqrt(2 / 5)
    return nn.init.trunc_normal_(noise, std=std, a=-3 * std, b=3 * std).to(x.dtype)


class Injection(FullPrecision):
    """How e, the block's input, enters every loop: its terms of x = state_scale h + input_scale e, or of W [h; e].

    W starts normal with variance 2 / (5 D), as Huginn's.
    """

    def __init__(self, kind: str, dim: int | None, device: Any, dtype: Any) -> None:
        super().__init__()
        self.kind = kind
        self.adapter: Map | None = None
        self.state_scale = self.input_scale = self.gate = None

        def vector() -> nn.Parameter:
            assert dim is not None
            return nn.Parameter(torch.empty(dim, device=device, dtype=torch.float32))

        if kind == "linear":
            assert dim is not None
            self.adapter = Map(2 * dim, dim, math.sqrt(2 / (5 * dim)), False, device, dtype)
        if kind == "gate":
            self.state_scale, self.input_scale = vector(), vector()
        if kind == "convex":
            self.gate = vector()
        self.fill()

    @torch.no_grad()
    def fill(self, generator: torch.Generator | None = None) -> None:
        """Scales at 1, the convex gate at a half."""
        for p, value in ((self.state_scale, 1.0), (self.input_scale, 1.0), (self.gate, 0.0)):
            if p is not None:
                p.fill_(value)

    def terms(self, e: Tensor) -> dict[str, Tensor]:
        if self.kind == "none":
            return {}
        if self.adapter is not None:
            own, injected = self.adapter.weight.chunk(2, 1)
            # The same in every loop.
            return {"mix": own, "e": nn.functional.linear(e, injected.to(e.dtype)).to(e.dtype)}
        if self.gate is not None:
            share = torch.sigmoid(self.gate.to(_wide(self.gate, e)))
            return {"e": e, "state_scale": share, "input_scale": 1 - share}
        if self.state_scale is not None and self.input_scale is not None:
            return {"e": e, "state_scale": self.state_scale, "input_scale": self.input_scale}
        return {"e": e}


class Residual(FullPrecision):
    """The residual over loops: none, LAuReL's alpha f + beta h + (h A) B, or Euler's h + (f - h) dt.

    LAuReL starts as none: alpha 1, beta 0, B 0. One alpha and one beta, or D of each.
    """

    def __init__(self, kind: str, dim: int | None, rank: int, per_channel: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.kind, self.rank = kind, rank
        self.alpha = self.beta = None
        self.low_rank: LowRank | None = None
        if kind == "laurel":
            assert dim is not None
            shape = (dim,) if per_channel else (1,)
            self.alpha, self.beta = (
                nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32)) for _ in range(2)
            )
            if rank:
                self.low_rank = LowRank(dim, rank, device, dtype)
            self.fill()

    @torch.no_grad()
    def fill(self, generator: torch.Generator | None = None) -> None:
        if self.alpha is not None and self.beta is not None:
            self.alpha.fill_(1.0)
            self.beta.fill_(0.0)

    def terms(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.alpha is not None and self.beta is not None:
            found = {"alpha": self.alpha, "beta": self.beta}
        if self.low_rank is not None:
            found["low_rank"] = (self.low_rank.down, self.low_rank.up)
        return found


class LowRank(nn.Module):
    """A [D, r] and B [r, D]."""

    def __init__(self, dim: int, rank: int, device: Any, dtype: Any) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Parameter(torch.empty(dim, rank, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(rank, dim, device=device, dtype=dtype))
        self.fill()

    @torch.no_grad()
    def fill(self, generator: torch.Generator | None = None) -> None:
        self.down.copy_(column_orthogonal(self.down.shape[0], self.rank))
        self.up.zero_()


class Conditioning(nn.Module):
    """A vector for every loop, added to what the core reads; zeros at the start.

    table: a row for each of M loops. sinusoidal: a linear map of sines and cosines of the loop's number. time: a small
    network of those of the loop's time t and step dt, in [0, 1], as LoopFormer conditions (there by modulation).
    """

    def __init__(self, kind: str, dim: int | None, max_loops: int | None, device: Any, dtype: Any) -> None:
        super().__init__()
        self.kind, self.max_loops = kind, max_loops
        self.table: nn.Parameter | None = None
        self.inner: Map | None = None
        self.outer: Map | None = None
        if kind == "table":
            assert dim is not None
            assert max_loops is not None
            self.table = nn.Parameter(torch.empty(max_loops, dim, device=device, dtype=dtype))
        if kind in ("sinusoidal", "time"):
            assert dim is not None
            if kind == "time":
                self.inner = Map(2 * FEATURES, dim, (2 * FEATURES) ** -0.5, True, device, dtype)
            self.outer = Map(dim if kind == "time" else FEATURES, dim, 0.0, True, device, dtype)
        self.fill()

    @torch.no_grad()
    def fill(self, generator: torch.Generator | None = None) -> None:
        if self.table is not None:
            self.table.zero_()

    def rows(self, loops: int, time_steps: list[float] | None, like: Tensor) -> list[Tensor] | None:
        """The vectors of `loops` loops."""
        if self.kind == "none":
            return None
        if self.table is not None:
            return list(self.table[:loops].unbind(0))
        assert self.outer is not None
        weight = self.outer.weight
        where: dict[str, Any] = {"device": like.device, "dtype": _wide(weight, like)}
        if self.inner is None:
            return list(self.outer(features(torch.arange(loops, **where)).to(weight.dtype)).unbind(0))
        steps = torch.tensor(time_steps if time_steps is not None else [1 / loops] * loops, **where)
        times = steps.cumsum(0) - steps
        # Times are fractions: they turn a thousand times as fast as numbers of loops.
        both = torch.cat([features(1000 * times), features(1000 * steps)], -1)
        return list(self.outer(nn.functional.silu(self.inner(both.to(weight.dtype)))).unbind(0))


def features(x: Tensor) -> Tensor:
    """Cosines and sines of x at FEATURES / 2 frequencies from 1 down to 1/10000, [..., FEATURES]."""
    half = FEATURES // 2
    turns = torch.exp(torch.arange(half, device=x.device, dtype=x.dtype) * (-math.log(10000.0) / half))
    angles = x[..., None] * turns
    return torch.cat([angles.cos(), angles.sin()], -1)


class LayerScalars(FullPrecision):
    """A float32 table for every loop and layer; see LoopedBlock's `layer_scalars`. It starts without effect."""

    def __init__(self, kind: str, max_loops: int | None, num_layers: int, device: Any) -> None:
        super().__init__()
        self.kind = kind
        self.table: nn.Parameter | None = None
        if kind != "none":
            assert max_loops is not None
            shape = (max_loops, num_layers) + ((2,) if kind == "stream" else ())
            self.table = nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))
            self.fill()

    @torch.no_grad()
    def fill(self, generator: torch.Generator | None = None) -> None:
        if self.table is not None:
            self.table.fill_(1.0)
            if self.kind == "stream":
                self.table[..., 1] = 0.0

    def rows(self, loops: int) -> list[Tensor] | None:
        return None if self.table is None else list(self.table[:loops].unbind(0))


class LoopNorm(nn.Module):
    """The weight of the RMSNorm after every loop."""

    def __init__(self, dim: int, device: Any, dtype: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    @torch.no_grad()
    def fill(self, generator: torch.Generator | None = None) -> None:
        self.weight.fill_(1.0)
