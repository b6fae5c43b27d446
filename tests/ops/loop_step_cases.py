"""Inputs of loop_step by name, and the formula written with other PyTorch calls than the reference's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern import loop_step
from effkern.ops import registry
from tests.numerics import assert_as_good_as_eager

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
SUMS = tuple(f"grad of {name}" for name in FACTORS)


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


def random_like(outputs: list[Tensor]) -> list[Tensor]:
    return [torch.randn_like(o) for o in outputs if o.requires_grad]


def check(kw: Keywords, impl: str, used: tuple[int, ...] = (0, 1)) -> None:
    """Results, and all gradients from those of the `used` ones, against the reference in float64."""
    wide, plain, dtype = to(kw, torch.float64), to(kw, None), kw["h"].dtype
    found: list[dict[str, Tensor]] = []
    grads: list[Tensor] = []
    for given, name in ((wide, "reference"), (plain, "reference"), (kw, impl)):
        outputs = ours(given, name)
        kept = [o for i, o in enumerate(o for o in outputs if o.requires_grad) if i in used]
        grads = grads or [torch.randn_like(o).to(dtype) for o in kept]
        found.append(run(given, kept, grads) | {f"all {i}": o.detach() for i, o in enumerate(outputs)})
    truth, eager, fast = found
    assert fast.keys() == truth.keys()
    unit, noise = torch.finfo(dtype).eps, noise_of_sums(wide, grads)
    # Of few rows eager's own error is a draw of few numbers.
    factor = 2.0 if kw["h"].numel() > 3 * kw["h"].shape[-1] else 4.0
    for name, value in fast.items():
        if value.numel() == 0:
            continue
        if name in SUMS and value.numel() == 1:
            error, of_eager = (value - truth[name]).norm(), (eager[name] - truth[name]).norm()
            assert error <= max(factor * of_eager, 8 * unit * noise[name], unit * truth[name].norm()), name
            continue
        # y hat is made of s, and products of g, both rounded to the streams' precision: half a unit in each term.
        ulps = max(8.0, unit / torch.finfo(value.dtype).eps)
        try:
            assert_as_good_as_eager(value, eager[name], truth[name], factor, ulps)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def noise_of_sums(kw: Keywords, grads: list[Tensor]) -> dict[str, float]:
    """For the gradients of single numbers: the root of the squares of all terms of the sum, which cancel.

    Roundings of the terms are independent, so that their sum's is this, times some units; that of a norm's mean, common
    to a row, is as large. A term's size is that before a norm takes its part off.
    """
    without = {"norm": False, "norm_weight": None, "save_branch": None}
    before = ours(kw | without, "reference")[0].detach()
    s = ours(kw, "reference")[0].detach()
    g = sum(t.double().abs() for t in grads)
    of_s = g * kw["state_scale"] if "state_scale" in kw else g
    if kw.get("norm") or "norm_weight" in kw:
        of_s = of_s * before.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * kw.get("norm_weight", 1.0)
    terms = {"alpha": of_s * kw["f"], "beta": of_s * kw["h"], "state_scale": g * s, "input_scale": g * kw.get("e", s)}
    return {f"grad of {name}": product.norm().item() for name, product in terms.items()}
