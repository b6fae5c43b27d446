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


def assert_rows_as_good_as_eager(
    fast: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    relative: float,
    absolute: float | torch.Tensor,
    factor: float = 2.0,
) -> None:
    """Row by row, so that one large row does not hide the others; infinities and NaN at the same places.

    `relative` is of the row's norm, `absolute` may differ by row. A row may also be `factor` times as far off as eager.
    """
    assert fast.shape == truth.shape
    for name, same in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        assert torch.equal(same(fast), same(truth)), f"{name} elsewhere: {same(fast).nonzero()} {same(truth).nonzero()}"
    size, shape = torch.isfinite(truth), (truth.shape[0], -1)

    def distance(x: torch.Tensor) -> torch.Tensor:
        return torch.where(size, x.double() - truth, 0.0).nan_to_num(0.0).reshape(shape).norm(dim=-1)

    bound = relative * torch.where(size, truth, 0.0).reshape(shape).norm(dim=-1) + absolute
    bound = torch.maximum(bound, factor * distance(eager))
    far = distance(fast)
    assert (far <= bound).all(), f"rows {(far > bound).nonzero().flatten().tolist()}: {far.tolist()} > {bound.tolist()}"
