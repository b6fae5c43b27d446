"""Cores for tests of looped blocks, the loops written out by hand, and the bytes that are alive."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from effkern.nn import LoopedBlock, Truncated

DIM = 6


class Layer(nn.Module):
    """z + dropout(tanh(W z) (1 + mask)); counts its calls."""

    def __init__(self, dim: int = DIM, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, z: Tensor, mask: Tensor | None = None, rope: Any = None, scale: Any = None) -> Tensor:
        self.calls += 1
        branch = torch.tanh(self.linear(z))
        if mask is not None:
            branch = branch * (1 + mask)
        if rope is not None:
            branch = branch * rope[0] + rope[1]
        if scale is not None:
            branch = branch * scale
        return z + self.dropout(branch)


def randomize(module: nn.Module, size: float = 0.3) -> nn.Module:
    """Parameters away from the start at which parts have no effect."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * size)
    return module


def by_hand(
    block: Any, x: Tensor, loops: int, *args: Any, time_steps: Any = None, state: Any = None, first: int = 0
) -> list[Tensor]:
    """h_1 .. h_L from the formulas, in plain PyTorch; `first`: loops that came before."""
    layers = list(block.core) if block.layered else [block.core]
    start, injection, residual = block.start_state, block.injection, block.residual
    h = x if state is None else state
    if start.kind == "zeros":
        h = torch.zeros_like(x)
    if start.kind == "learned":
        h = start.vector.expand_as(x)
    states = []
    dt = time_steps or [1 / (block.substeps or loops)] * loops
    for t in range(loops):
        z = h
        if injection.kind == "add":
            z = h + x
        if injection.kind == "linear":
            z = torch.cat([h, x], -1) @ injection.adapter.weight.T
        if injection.kind == "gate":
            z = injection.state_scale * h + injection.input_scale * x
        if injection.kind == "convex":
            share = injection.gate.to(x.dtype).sigmoid()
            z = share * h + (1 - share) * x
        rows = block.conditioning.rows(first + loops, time_steps, x)
        if rows is not None:
            z = z + rows[first + t]
        for i, layer in enumerate(layers):
            table = block.layer_scalars.table
            kind = block.layer_scalars.kind
            if kind == "stream":
                z = layer(table[t, i, 0] * z + table[t, i, 1] * x, *args)
            elif kind == "increment":
                z = z + table[t, i].to(x.dtype) * (layer(z, *args) - z)
            elif kind == "argument":
                z = layer(z, *args, scale=table[t, i])
            else:
                z = layer(z, *args)
        if residual.kind == "laurel":
            z = residual.alpha * z + residual.beta * h
            if residual.low_rank is not None:
                z = z + h @ residual.low_rank.down @ residual.low_rank.up
        if residual.kind == "euler":
            z = h + (z - h) * dt[t]
        if block.norm is not None:
            z = z * (z.square().mean(-1, keepdim=True) + block.norm_eps).rsqrt() * block.norm.weight
        h = z
        states.append(h)
    return states


class AliveBytes(TorchDispatchMode):
    """The most bytes of tensors made since it was entered that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        for x in _tensors(out):
            storage = x.untyped_storage()
            key = storage._cdata
            if key in known or key in self.alive:
                continue
            size = storage.nbytes()
            self.alive[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


LOOPS = 4
# All but autograd's own.
OURS = ["full", "recompute", "recompute_layer", Truncated(LOOPS), Truncated(LOOPS, recompute=False)]


def stack(dtype=torch.float32, loops=LOOPS, dropout=0.0, **options) -> LoopedBlock:
    layers = [Layer(dtype=dtype, dropout=dropout) for _ in range(2)]
    return randomize(LoopedBlock(layers, loops, dim=DIM, dtype=dtype, **options))


def results(block, x, mode, seed=None, dtype=None, **options):
    """Output, and the gradient of every leaf."""
    if seed is not None:
        torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        y = block(x, mode=mode, **options)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()])]
