"""Inputs of loop_step by name, and the formula written with other PyTorch calls than the reference's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern import loop_step
from effkern.ops import registry

Keywords = dict[str, Any]

# Each entry is one path of the op: what is there beside f and h. A factor "one" or "channel": a tensor [1] or [D].
CASES: dict[str, Keywords] = {
    "f alone": {},
    "damped": {"alpha": 0.25, "beta": 0.75},
    "injection": {"e": True},
    "embedding alone": {"embedding": True},
    "learned entrance": {"e": True, "state_scale": "channel", "input_scale": "one", "embedding": True},
    "scaled": {"e": True, "state_scale": 0.7, "input_scale": 0.3},
    "scaled state alone": {"state_scale": 0.7, "beta": 1.0},
    "embedding": {"beta": 1.0, "embedding": True},
    "norm": {"norm": True},
    "norm and residual": {"norm": True, "beta": 1.0, "e": True},
    "norm weight": {"norm_weight": True, "beta": 1.0, "e": True, "embedding": True},
    "learned numbers": {"alpha": "one", "beta": "one", "e": True, "state_scale": "one", "input_scale": "one"},
    "learned numbers, norm": {
        "alpha": "one", "beta": "one", "e": True, "state_scale": "one", "input_scale": "one", "norm_weight": True,
    },
    "learned alpha, norm": {"alpha": "channel", "beta": 0.5, "norm_weight": True},
    "learned alpha alone, norm": {"alpha": "one", "norm": True},
    "learned beta, norm": {"beta": "channel", "norm_weight": True},
    "per channel": {"alpha": "channel", "beta": "channel", "e": True, "state_scale": "channel",
                    "input_scale": "channel"},
    "low rank": {"low_rank": 3},
    "low rank and beta": {"low_rank": 3, "beta": 0.5, "alpha": 0.5},
    "low rank, norm": {"low_rank": 3, "beta": 1.0, "norm_weight": True},
    "low rank alone, norm": {"low_rank": 1, "norm": True, "alpha": "one"},
    "branch kept": {"beta": 0.5, "norm_weight": True, "save_branch": True},
    "branch kept, no beta": {"norm": True, "save_branch": True},
    "branch kept, low rank": {"low_rank": 3, "beta": "one", "norm_weight": True, "save_branch": True},
    "everything": {
        "alpha": "channel", "beta": "channel", "e": True, "state_scale": "channel", "input_scale": "channel",
        "low_rank": 3, "norm_weight": True, "embedding": True, "eps": 1e-3,
    },
    "everything, branch kept": {
        "alpha": "channel", "beta": "channel", "e": True, "state_scale": "channel", "input_scale": "one",
        "low_rank": 3, "norm_weight": True, "embedding": True, "save_branch": True,
    },
}  # fmt: skip
FACTORS = ("alpha", "beta", "state_scale", "input_scale")


def make(name: str, rows: tuple[int, ...] = (11,), dim: int = 13, dtype: torch.dtype = torch.float32) -> Keywords:
    """Arguments of a case; streams in `dtype`, parameters in float32 (float64)."""
    case = CASES[name]
    wide = torch.promote_types(dtype, torch.float32)

    def stream() -> Tensor:
        return torch.randn(*rows, dim).to(dtype).requires_grad_()

    def parameter(*shape: int) -> Tensor:
        return (0.5 * torch.randn(shape)).to(wide).requires_grad_()

    kw: Keywords = {"f": stream(), "h": stream(), "return_change": True}
    for key, value in case.items():
        if key in FACTORS and isinstance(value, str):
            value = (1 + parameter(*((1,) if value == "one" else (dim,)))).detach().requires_grad_()
        elif key == "e":
            value = stream()
        elif key == "low_rank":
            value = (parameter(dim, value), parameter(value, dim))
        elif key == "norm_weight":
            value = (1 + parameter(dim)).detach().requires_grad_()
        elif key == "embedding":
            value = parameter(dim)
        kw[key] = value
    return kw


def leaves(kw: Keywords) -> dict[str, Tensor]:
    """The tensors that get a gradient, by name."""
    flat = {k: v for k, v in kw.items() if isinstance(v, Tensor)}
    return flat | dict(zip(("A", "B"), kw.get("low_rank", ())))


def to(kw: Keywords, dtype: torch.dtype | None) -> Keywords:
    """The same values as new leaves, in another precision unless None."""

    def cast(v: Any) -> Any:
        if isinstance(v, tuple):
            return tuple(cast(m) for m in v)
        return v.detach().to(dtype or v.dtype, copy=True).requires_grad_() if isinstance(v, Tensor) else v

    return {k: cast(v) for k, v in kw.items()}


def formula(
    f, h, e=None, alpha=1.0, beta=0.0, low_rank=None, norm_weight=None, norm=False, eps=1e-6, state_scale=1.0,
    input_scale=1.0, embedding=None, return_change=False, save_branch=None,
) -> list[Tensor]:  # fmt: skip
    """s, x (where it is another) and the change."""
    s = torch.mul(f, alpha) + torch.mul(h, beta)
    if low_rank is not None:
        s = torch.einsum("...d,dr,re->...e", h, *low_rank) + s
    if norm or norm_weight is not None:
        s = F.rms_norm(s, s.shape[-1:], norm_weight, eps)
    out = [s]
    if e is not None or embedding is not None or isinstance(state_scale, Tensor) or state_scale != 1.0:
        x = torch.mul(s, state_scale)
        x = x if e is None else torch.add(x, torch.mul(e, input_scale))
        out.append(x if embedding is None else torch.add(x, embedding))
    if return_change:
        out.append(((s - h).square().sum(-1).sqrt() / s.square().sum(-1).sqrt()).detach())
    return out


def ours(kw: Keywords, impl: str) -> list[Tensor]:
    out = loop_step(**kw, impl=impl)
    return [t for i, t in enumerate(out) if t is not None and (i != 1 or t is not out.state)]


def run(kw: Keywords, outputs: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name; `grads` of the outputs that have one, in order."""
    named = leaves(kw)
    kept = [o for o in outputs if o.requires_grad][: len(grads)]
    got = torch.autograd.grad(kept, list(named.values()), [g.to(o.dtype) for g, o in zip(grads, kept)],
                              allow_unused=True)  # fmt: skip
    return {f"output {i}": o.detach() for i, o in enumerate(outputs)} | {
        f"grad of {n}": torch.zeros_like(v) if g is None else g for (n, v), g in zip(named.items(), got)
    }


def implementations() -> list[str]:
    """Those that run here; Triton has its own file, as its interpreter is slow."""
    cpu = torch.device("cpu")
    known = registry.registered()["loop_step"]
    return [i.name for i in known if i.name != "triton" and i.unavailable(cpu) is None]
