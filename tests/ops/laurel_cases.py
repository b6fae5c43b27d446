"""Inputs of laurel_residual by name, and the formula written out in plain autograd PyTorch as its oracle."""

from typing import Any

import torch
from torch import Tensor

from effkern import laurel_residual
from effkern.ops import registry

Keywords = dict[str, Any]

# Each entry is one path of the op: what is there beside branch and x.
CASES: dict[str, Keywords] = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "normed": {"norm_weight": True},
    "rw": {"weights": "scalar"},
    "rw per channel": {"weights": "channel", "norm_weight": True},
    "rw softmax": {"weights": "scalar", "scalar_map": "softmax", "norm_weight": True},
    "rw sigmoid1": {"weights": "scalar", "scalar_map": "sigmoid1"},
    "rw sigmoid1 per channel": {"weights": "channel", "scalar_map": "sigmoid1"},
    "rw sigmoid": {"weights": "scalar", "scalar_map": "sigmoid", "norm_weight": True},
    "rw none": {"weights": "scalar", "scalar_map": "none", "norm_weight": True},
    "rw none per channel": {"weights": "channel", "scalar_map": "none"},
    "rw none, branch not kept": {"weights": "scalar", "scalar_map": "none", "save_branch": False},
    "rw, branch kept": {"weights": "scalar", "save_branch": True, "norm_weight": True},
    "lr": {"down": 3, "up": 3},
    "lr normed": {"down": 3, "up": 3, "norm_weight": True},
    "rw+lr": {"weights": "scalar", "down": 3, "up": 3, "norm_weight": True},
    "rw+lr per channel": {"weights": "channel", "down": 3, "up": 3, "norm_weight": True},
    "rank one": {"weights": "scalar", "down": 1, "up": 1},
    "look ahead": {"weights": "scalar", "down": 5, "up": 3, "norm_weight": True},
    "look ahead only": {"down": 4},
    "past": {"weights": "scalar", "down": 5, "up": 7, "past": 4, "norm_weight": True},
    "past only": {"weights": "channel", "up": 4, "past": 4},
    "x0": {"weights": "scalar", "addends": 1, "addend_weights": "scalar", "norm_weight": True},
    "x0 per channel": {"weights": "scalar", "addends": 1, "addend_weights": "channel"},
    "previous": {"addends": 3, "addend_weights": "scalar"},
    "rw + previous": {"weights": "channel", "addends": 2, "addend_weights": "scalar", "norm_weight": True},
    "addends of factor one": {"weights": "scalar", "addends": 2},
    "gemma": {"scale": 0.5**0.5, "down": 4, "up": 4, "low_rank_norm": True, "addends": 1, "norm_weight": True},
    "everything": {
        "weights": "channel", "down": 5, "up": 7, "past": 4, "low_rank_norm": True, "addends": 2, "scale": 1.3,
        "addend_weights": "channel", "norm_weight": True, "norm_eps": 1e-3, "low_rank_eps": 1e-2,
    },
}  # fmt: skip


def make(name: str, rows: tuple[int, ...] = (11,), dim: int = 13, dtype: torch.dtype = torch.float32) -> Keywords:
    """branch, x and the keywords of a case; activations in `dtype`, parameters in float32 (float64)."""
    case = CASES[name]
    wide = torch.promote_types(dtype, torch.float32)

    def activation(width: int = dim) -> Tensor:
        return torch.randn(*rows, width).to(dtype).requires_grad_()

    def parameter(*shape: int, spread: float = 0.5) -> Tensor:
        return (spread * torch.randn(shape)).to(wide).requires_grad_()

    kw: Keywords = {"branch": activation(), "x": activation()}
    kw |= {k: v for k, v in case.items() if k in ("scale", "scalar_map", "save_branch", "norm_eps", "low_rank_eps")}
    if "weights" in case:
        count = 1 if case.get("scalar_map") == "sigmoid1" else 2
        weights = parameter(*((count,) if case["weights"] == "scalar" else (count, dim)))
        kw["weights"] = (weights.detach().abs() + 0.5).requires_grad_() if case.get("scalar_map") == "none" else weights
    if "down" in case:
        kw["down"] = parameter(dim, case["down"])
    if "up" in case:
        kw["up"] = parameter(case["up"], dim)
    if "past" in case:
        kw["past"] = activation(case["past"])
    if "addends" in case:
        kw["addends"] = [activation() for _ in range(case["addends"])]
    if "addend_weights" in case:
        kw["addend_weights"] = parameter(case["addends"], *((dim,) if case["addend_weights"] == "channel" else ()))
    for norm in ("low_rank_norm", "norm_weight"):
        if norm in case:
            kw[norm] = (1 + parameter(dim)).detach().requires_grad_()
    return kw


def leaves(kw: Keywords) -> dict[str, Tensor]:
    """The tensors that get a gradient, by name."""
    flat = {k: v for k, v in kw.items() if isinstance(v, Tensor)}
    return flat | {f"addends[{j}]": e for j, e in enumerate(kw.get("addends", ()))}


def to(kw: Keywords, dtype: torch.dtype) -> Keywords:
    """The same values in another precision, as new leaves."""

    def cast(v: Any) -> Any:
        if isinstance(v, list):
            return [cast(e) for e in v]
        return v.detach().to(dtype).requires_grad_() if isinstance(v, Tensor) else v

    return {k: cast(v) for k, v in kw.items()}


def _scalars(weights: Tensor | None, scalar_map: str) -> tuple[Any, Any]:
    if weights is None:
        return 1.0, 1.0
    if scalar_map == "softmax2":
        e = weights.exp()
        return 2 * e[0] / e.sum(0), 2 * e[1] / e.sum(0)
    if scalar_map == "softmax":
        return weights.softmax(0)[0], weights.softmax(0)[1]
    if scalar_map == "sigmoid1":
        return weights[0].sigmoid(), 1 - weights[0].sigmoid()
    if scalar_map == "sigmoid":
        return 2 * weights[0].sigmoid(), 2 * weights[1].sigmoid()
    return weights[0], weights[1]


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def formula(
    branch, x, weights=None, scalar_map="softmax2", scale=1.0, down=None, up=None, past=None, low_rank_norm=None,
    low_rank_eps=1e-6, addends=(), addend_weights=None, norm_weight=None, norm_eps=1e-6, save_branch=None,
) -> list[Tensor]:  # fmt: skip
    """What the docstring says, one plain operation after the other, as eager code writes it; no op of ours."""
    alpha, beta = _scalars(weights, scalar_map)
    like = x.dtype
    num_past = 0 if past is None else past.shape[-1]
    own = 0 if up is None else up.shape[0] - num_past
    products = None if down is None else x @ down.to(like)
    inner = x
    if up is not None:
        parts = ([] if products is None else [products[..., :own]]) + ([] if past is None else [past])
        low = torch.cat(parts, -1) @ up.to(like)
        if low_rank_norm is not None:
            low = _rms(low, low_rank_norm, low_rank_eps).to(like)
        inner = x + low
    y = alpha * branch + beta * inner
    for j, e in enumerate(addends):
        y = y + (e if addend_weights is None else addend_weights[j] * e)
    y = (scale * y).to(like)
    out = [y]
    if norm_weight is not None:
        out.append(_rms(y, norm_weight, norm_eps).to(like))
    if products is not None and own < products.shape[-1]:
        out.append(products[..., own:])
    return out


def ours(kw: Keywords, impl: str) -> list[Tensor]:
    return [t for t in laurel_residual(**kw, impl=impl) if t is not None]


def run(kw: Keywords, outputs: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    named = leaves(kw)
    got = torch.autograd.grad(outputs, list(named.values()), [g.to(o.dtype) for g, o in zip(grads, outputs)],
                              allow_unused=True)  # fmt: skip
    return {f"output {i}": o.detach() for i, o in enumerate(outputs)} | {
        n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(named.items(), got)
    }


def implementations() -> list[str]:
    """Those that run here; Triton has its own file, as its interpreter is slow."""
    cpu = torch.device("cpu")
    known = registry.registered()["laurel_residual"]
    return [i.name for i in known if i.name != "triton" and i.unavailable(cpu) is None]
