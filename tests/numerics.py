"""How tests compare numbers: the bound follows from what plain torch achieves in the same precision."""

import torch


def rel_err(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_as_good_as_eager(
    fast: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, factor: float = 2.0, ulps: float = 1.0
) -> None:
    """`truth`: reference in float64 on the same inputs; `eager`: reference in the inputs' own dtype.

    `ulps`: floor in units of eps; 4 for a single number, where eager may be exact by luck.
    """
    assert fast.dtype == eager.dtype, (fast.dtype, eager.dtype)
    assert torch.isfinite(truth).all()
    assert torch.isfinite(fast).all()
    bound = max(factor * rel_err(eager, truth), ulps * torch.finfo(fast.dtype).eps)
    assert rel_err(fast, truth) <= bound, f"{rel_err(fast, truth):.3e} > {bound:.3e}"
